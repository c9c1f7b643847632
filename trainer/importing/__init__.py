"""Weights and checkpoints in other formats, read without running their code."""
