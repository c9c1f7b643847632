"""Perdure: training jobs that are killed and finish anyway."""
