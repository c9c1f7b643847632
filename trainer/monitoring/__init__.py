"""Timing, FLOPs, memory and profiling of a run."""
