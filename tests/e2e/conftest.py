"""The fixtures of support/run_commands.py, for every test of real processes."""

from support.run_commands import command, wait_for

__all__ = ["command", "wait_for"]
