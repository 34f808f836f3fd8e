"""Tests of conversion and checkpoints."""
