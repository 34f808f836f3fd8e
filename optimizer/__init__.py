"""The update: one gradient norm over all stages, clipping, learning rate, AdamW."""
