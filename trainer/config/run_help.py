"""The text of `python -m trainer.run --help`: groups, settings and flags, without composing them.

Hydra's help composes the configuration, which takes a second; `--help` with other arguments, and
`--cfg job`, still show the composed one.
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from trainer.config.compose import conf_folder
from trainer.config.schema import Run

_HEAD = """\
usage: python -m trainer.run [GROUP=OPTION …] [KEY=VALUE …] [flags]

Trains a model, and resumes after any interruption if the same command is repeated.

  python -m trainer.run                                    train the default
  python -m trainer.run model=mlp data=mnist data.dir=/d   choose from groups
  python -m trainer.run trainer.max_epochs=3               change settings
"""
_FLAGS = """\
flags:
  --check            check the configuration; --check=run also computes one batch
  --config-dir DIR   add groups of your own, for example DIR/experiment/mine.yaml
  -m, --multirun     run a sweep: seed=1,2,3
  --cfg job          print the composed configuration
  --version          print the version
  --hydra-help       print Hydra's own flags
"""


def run_help() -> str:
    """Return the text."""
    lines = [_HEAD, "groups:"]
    for folder in sorted(path for path in conf_folder().iterdir() if path.is_dir()):
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        if options:
            lines.append(f"  {folder.name:12} {', '.join(options)}")
    lines += [
        "",
        "settings and their defaults (model, data, task, optimizer, scheduler and tracker also",
        "accept the arguments of their _target_):",
    ]
    lines += [f"  {key}={default_text(item) or '…'}" for key, item in settings(Run)]
    lines += ["", "docs/settings.md explains each.", "", _FLAGS.rstrip()]
    return "\n".join(lines)


def settings(cls: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield the full key and the field of every setting of a dataclass, nested ones last."""
    for item in fields(cls):
        if not _is_nested(item):
            yield prefix + item.name, item
    for item in fields(cls):
        if _is_nested(item):
            yield from settings(item.default_factory, f"{prefix}{item.name}.")  # type: ignore[arg-type]


def _is_nested(item: Field[Any]) -> bool:
    return is_dataclass(item.default_factory)


def default_text(item: Field[Any]) -> str:
    """Return a default in the form of the command line; "" if conf/config.yaml has it."""
    make: Any = item.default_factory
    value: Any = item.default if item.default is not MISSING else make()
    if value == "???":
        return ""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return str(value).replace("'", "")
