"""python -m trainer.export RUN [format=…] [step=…] [weights=…] [out=…]: weights leave a run."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.arguments import parse
from trainer.config import ObjectStore
from trainer.errors import DONE, ConfigError, PerdureError, closest
from trainer.export import safetensors, state_dict
from trainer.export.source import open_source
from trainer.storage import Store, is_local, open_store

_FORMATS = {"safetensors": safetensors, "state_dict": state_dict}
_WEIGHTS = ("model", "ema")
_OPTIONS = {"format": "safetensors", "step": "latest", "weights": "model", "out": ""}
_USAGE = f"""usage: python -m trainer.export RUN [format=…] [step=…] [weights=…] [out=…]
  RUN     directory of a run, a folder of checkpoints, or one of them; local, s3://… and the like
  format  {" or ".join(_FORMATS)} (default safetensors)
  step    latest, best, or the number of a step that the run has kept (default latest)
  weights model, or ema: their moving average, where trainer.ema_decay was set (default model)
  out     file to write (default RUN/exports/step-N.<suffix of the format>)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(_USAGE)
        return DONE if argv else ConfigError.exit_code
    try:
        given = parse(argv, _USAGE, options=_OPTIONS)
        format, step, weights, out = (given.options[key] for key in _OPTIONS)
        if format not in _FORMATS:
            raise ConfigError(f"there is no format {format!r}{closest(format, _FORMATS)}")
        if weights not in _WEIGHTS:
            raise ConfigError(f"weights={weights} is neither model nor ema")
        averaged = weights == "ema"
        path, count = export(given.places[0], format, step, out, given.store, averaged=averaged)
    except PerdureError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    size = f", {path.stat().st_size:,} bytes" if isinstance(path, Path) else ""
    print(f"{path}: {count:,} tensors{size}")
    return DONE


def export(
    run_dir: str,
    format: str,
    step: str,
    out: str,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
    *,
    averaged: bool = False,
) -> tuple[Path | str, int]:
    """Write the weights of a checkpoint; return the file's place and the number of tensors.

    Needs one CPU process and no process group. The file appears whole and durable, or not at all.
    """
    source = open_source(run_dir, step, settings)
    module = _FORMATS[format]
    name = f"step-{source.commit.step:08d}{'-ema' if averaged else ''}{module.SUFFIX}"
    if not out and not is_local(run_dir):
        with tempfile.TemporaryDirectory(prefix="perdure-") as folder:
            here = str(Path(folder, name))
            path, count = export(run_dir, format, step, here, settings, averaged=averaged)
            return _into_store(path, open_store(run_dir, settings), f"exports/{name}"), count
    path = Path(out) if out else Path(run_dir.removeprefix("file://")) / "exports" / name
    weights = source.weights(averaged=averaged)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            module.write(weights, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"out={path} cannot be written: {error.strerror}") from None
    return path, len(weights)


def _into_store(path: Path | str, store: Store, key: str) -> str:
    """Move a file into the run, part by part; what an earlier export left there goes."""
    store.delete([key])
    with open(path, "rb") as file:
        total_bytes = os.fstat(file.fileno()).st_size
        new = store.open_new(key, total_bytes)
        try:
            for start in range(0, total_bytes, new.part_bytes):
                new.put(start, memoryview(file.read(new.part_bytes)))
            new.finish()
        except BaseException:
            new.abort()
            raise
    return f"{store.url}/{key}"


if __name__ == "__main__":
    sys.exit(main())
