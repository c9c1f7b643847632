"""The fixture of ranks.py, for every test of several ranks."""

from support.ranks import on_ranks

__all__ = ["on_ranks"]
