"""Embedding, block and head of each model family, under the names of the layer shards."""
