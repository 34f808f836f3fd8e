"""What a run tells: metrics, plots, progress, logs, Weights & Biases. Imports nothing of ours."""
