"""python -m trainer.predict EXPORT input=… [compare=…] [out=…]: run what was exported."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from trainer.cli import Arguments, command, parse
from trainer.config import targets
from trainer.config.compose import compose
from trainer.config.schema import ObjectStore
from trainer.core.atomic_file import atomic_file
from trainer.core.formatting import pluralize, table
from trainer.core.nested import map_leaves
from trainer.errors import DONE, ConfigError, problems_text
from trainer.export import inputs
from trainer.export.contract import is_true
from trainer.export.formats import open_export, record_path
from trainer.export.inputs import Batch, Interface
from trainer.export.predicting import Answer, compare, predict
from trainer.storage import local_path, open_store
from trainer.storage.transfer import download
from trainer.training import build

_OPTIONS = {
    "model": "", "input": "", "out": "", "device": "cpu", "batch_size": "64", "top": "1",
    "trusted": "false",
}  # fmt: skip
_RUN_KEYS = ("data", "sample")
_USAGE = """usage: python -m trainer.predict EXPORT input=… [out=…] [device=…] [top=…]
       python -m trainer.predict EXPORT data=… [data.x=…]
       python -m trainer.predict EXPORT OTHER --compare input=…
  EXPORT      what python -m trainer.export wrote in a form that can be run (also model=EXPORT)
  input       pictures (a file, a folder, a pattern), .npy, .npz, or an IDX file
  data        a data group, as trainer.run has it: its evaluation part, with the accuracy
  out         a file for one JSON object an input; .npz: the outputs themselves
  device      cpu or cuda (default cpu)
  batch_size  inputs at a time (default 64)
  top         classes to show of each input (default 1)
  trusted     true: open a pickled module (format=full_model), which may run any code
  --compare   run two exports on the same inputs: how often they agree, and how fast each is"""
_FLAGS = ("--compare",)
_SHOWN = 40
"""Inputs that are shown when nobody asked for a file; the rest are counted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _predict)


def _predict(argv: list[str]) -> int:
    settings = [a for a in argv if a.partition("=")[0].partition(".")[0] in _RUN_KEYS]
    mine = [a for a in argv if a not in settings]
    given = parse(mine, _USAGE, options=_OPTIONS, flags=_FLAGS, places=(0, 1, 2))
    places = [*given.places, *filter(None, [given.options["model"]])]
    wanted = 2 if "--compare" in given.flags else 1
    if len(places) != wanted:
        text = f"{pluralize(wanted, 'export')} needed, {len(places)} given"
        raise ConfigError(f"{text}\n{_USAGE}")
    device, batch_size = given.options["device"], _count(given, "batch_size")
    trusted = is_true(given.options, "trusted")
    with _here(places[0], given.store) as first:
        model = open_export(first, device, trusted=trusted)
        interface = _interface(first)
        batches = _batches(given, settings, interface, interface.batch_size or batch_size)
        if len(places) == 2:
            with _here(places[1], given.store) as second:
                other = open_export(second, device, trusted=trusted)
                print(compare(model, other, batches, places))
            return DONE
        _tell(predict(model, batches, interface), interface, given)
    return DONE


def _count(given: Arguments, key: str) -> int:
    text = given.options[key]
    if not (text.isdecimal() and int(text) >= 1):
        raise ConfigError(f"{key}={text} is not a number from 1 on")
    return int(text)


def _batches(
    given: Arguments, settings: Sequence[str], interface: Interface, batch_size: int
) -> Iterator[Batch]:
    place = given.options["input"]
    if bool(place) == bool(settings):
        raise ConfigError(f"give either input=… or data=…\n{_USAGE}")
    if place:
        return inputs.read(place, interface, batch_size)
    run, problems = compose(settings, _USAGE)
    problems += targets.check_target(run.data, "data")
    if problems:
        raise ConfigError(problems_text(problems))
    return inputs.evaluation(build.build_data(run), interface, batch_size)


def _interface(path: Path) -> Interface:
    """Return what the record beside an export says of its inputs."""
    record = record_path(path)
    try:
        found = json.loads(record.read_bytes())
        made = Interface(found["inputs"], found["preprocessing"])
        made.first, made.batch_size  # noqa: B018 (that they are there)
    except FileNotFoundError:
        what = "there" if path.exists() else "there, nor the export itself"
        raise ConfigError(
            f"{record} is not {what}: it says what the export takes; python -m trainer.export "
            "writes both, so copy both"
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"{record} does not describe an export that can be run ({type(error).__name__}: "
            f"{error}); export the run again"
        ) from None
    return made


@contextmanager
def _here(place: str, settings: ObjectStore) -> Iterator[Path]:
    """Give an export's path on this machine; of one in a store, that of a copy."""
    if (path := local_path(place)) is not None:
        yield path
        return
    parent, _, name = place.rstrip("/").rpartition("/")
    store = open_store(parent, settings)
    with tempfile.TemporaryDirectory(prefix="perdure-") as folder:
        for key in [*(store.list(name) or [name]), record_path(Path(name)).name]:
            try:
                download(store, key, Path(folder, key))
            except FileNotFoundError:
                raise ConfigError(f"no such export: {store.url}/{key}") from None
        yield Path(folder, name)


# --- what is told --------------------------------------------------------------------------------


def _tell(answers: Iterator[Answer], interface: Interface, given: Arguments) -> None:
    out, top = given.options["out"], _count(given, "top")
    if out.endswith(".npz"):
        _save(list(answers), Path(out))
        return
    counted, right, labelled, rows = 0, 0, 0, list[list[str]]()
    is_classified = False
    with _lines(out) as file:
        for answer in answers:
            counted += 1
            line = _described(answer, interface.classes, top)
            is_classified = is_classified or "class" in line
            if answer.label is not None and answer.chances is not None:
                labelled += 1
                right += int(answer.chances.argmax()) == answer.label
            if file is not None:
                file.write((json.dumps(_strict(line), ensure_ascii=False) + "\n").encode())
            elif counted <= _SHOWN:
                rows.append(_row(line))
    if rows:
        titles = ["class", "probability"] * top if is_classified else ["output"] * len(rows[0])
        print(table([["input", *titles[: len(rows[0]) - 1]], *rows]))
    if counted > len(rows):
        print(f"{counted:,} inputs, {out or f'the first {len(rows)} shown; out=FILE has all'}")
    if labelled:
        print(f"accuracy {right / labelled:.4f} of {labelled:,}")


@contextmanager
def _lines(out: str) -> Iterator[IO[bytes] | None]:
    """Give a file for lines that appears whole, or not at all; None without a name."""
    if not out:
        yield None
        return
    try:
        with atomic_file(Path(out), durable=False) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"out={out} cannot be written: {error.strerror}") from None


def _save(answers: Sequence[Answer], path: Path) -> None:
    arrays = {key: np.stack([a.outputs[key] for a in answers]) for key in answers[0].outputs}
    try:
        with atomic_file(path, durable=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ConfigError(f"out={path} cannot be written: {error.strerror}") from None
    shapes = ", ".join(f"{key} {list(array.shape)}" for key, array in arrays.items())
    print(f"{path}: {shapes}")


def _described(answer: Answer, classes: list[str] | None, top: int) -> dict[str, Any]:
    """Return what is told of an answer: the likeliest classes, or the outputs as they are."""
    found: dict[str, Any] = {"input": answer.name}
    chances = answer.chances
    if chances is None:
        return {**found, **{key: values.tolist() for key, values in answer.outputs.items()}}
    likely = [int(index) for index in np.argsort(-chances)[:top]]
    named = [_name(index, classes, len(chances)) for index in likely]
    found |= {"class": named[0], "probability": round(float(chances[likely[0]]), 6)}
    if top > 1:
        rest = zip(named, likely, strict=True)
        found["top"] = [{"class": n, "probability": round(float(chances[i]), 6)} for n, i in rest]
    if answer.label is not None:
        found["label"] = _name(answer.label, classes, len(chances))
    return found


def _strict(value: Any) -> Any:
    """Return a value as JSON can hold it: null for NaN and infinity."""
    return map_leaves(lambda v: v if not isinstance(v, float) or math.isfinite(v) else None, value)


def _name(index: int, classes: list[str] | None, count: int) -> str | int:
    is_named = classes is not None and len(classes) == count and 0 <= index < count
    return classes[index] if classes is not None and is_named else index


def _row(line: dict[str, Any]) -> list[str]:
    if "class" not in line:
        return [
            str(line["input"]),
            *(f"{key} {_short(line[key])}" for key in line if key != "input"),
        ]
    shown = line.get("top", [line])
    return [
        str(line["input"]),
        *(cell for each in shown for cell in (str(each["class"]), f"{each['probability']:.4f}")),
    ]


def _short(values: Any) -> str:
    text = json.dumps(values)
    return text if len(text) <= 40 else f"{text[:37]}..."


if __name__ == "__main__":
    sys.exit(main())
