"""Trackers: destinations of metrics."""
