"""Exports: what was trained, for people who have not got this project."""
