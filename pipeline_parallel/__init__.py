"""A pipeline: its schedule (when), its stage (how), its channel (to whom), and the engine."""
