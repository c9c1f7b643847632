"""perdure COMMAND …: the same as python -m trainer.COMMAND …, also as python -m perdure COMMAND."""

import os
import runpy
import sys

from perdure import import_trainer


def main() -> int:
    """Run a command in this process, or list the commands; return the exit code."""
    import_trainer()
    from trainer.__main__ import COMMANDS
    from trainer.__main__ import main as list_commands

    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with python -m, for `_target_`s of the user
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        return list_commands()
    del sys.argv[1]
    runpy.run_module(f"trainer.{command}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
