"""python -m trainer: what there is to type."""

import sys

from trainer.errors import DONE, ConfigError, closest

_COMMANDS = {
    "run": "train a run, or go on with it",
    "prepare": "prepare its data before",
    "doctor": "examine this machine or cluster for it",
    "evaluate": "measure a checkpoint again",
    "checkpoints": "list, show, verify, diff, prune and copy what was saved",
    "export": "write what was trained in a form for others",
    "predict": "run an export on inputs",
    "report": "one page about a run, or several",
    "top": "watch runs",
}


def main() -> int:
    """Print the commands; return the exit code."""
    wanted = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
    if wanted:
        hint = closest(wanted[0], _COMMANDS)
        print(
            f"ConfigError: python -m trainer takes no argument {wanted[0]!r}{hint}; "
            "type python -m trainer.COMMAND",
            file=sys.stderr,
        )
        return ConfigError.exit_code
    width = max(map(len, _COMMANDS))
    print("Training jobs that are killed and finish anyway.\n")
    for name, what in _COMMANDS.items():
        print(f"  python -m trainer.{name:<{width}}  {what}")
    print("\nEach one tells more with --help.")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
