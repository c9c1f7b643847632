"""python -m trainer: list the commands."""

import sys

from trainer.errors import CONFIGURATION, DONE, closest, print_error, version_text

COMMANDS = {
    "run": "train a model, or resume its run",
    "prepare": "prepare the data before training",
    "doctor": "check this machine or cluster before training",
    "evaluate": "evaluate a checkpoint",
    "checkpoints": "list, show, verify, diff, prune and copy checkpoints",
    "export": "export a model to another format",
    "predict": "run an exported model on inputs",
    "report": "write an HTML page about one or more runs",
    "top": "show live runs as a table",
}


def main() -> int:
    """Print the commands; return the exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("-h", "--help")]
    if arguments == ["--version"]:
        print(version_text())
        return DONE
    if arguments:
        hint = closest(arguments[0], COMMANDS)
        print_error(
            f"python -m trainer takes no argument {arguments[0]!r}{hint}; "
            "type python -m trainer.COMMAND"
        )
        return CONFIGURATION
    width = max(map(len, COMMANDS))
    print("Training jobs that are killed and finish anyway.\n")
    for name, description in COMMANDS.items():
        print(f"  python -m trainer.{name:<{width}}  {description}")
    print("\nRun a command with --help for its options.")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
