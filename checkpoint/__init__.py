"""Layer shards in, training state in and out, Hugging Face out."""
