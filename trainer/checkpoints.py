"""python -m trainer.checkpoints list|show|verify|diff|prune|copy RUN_OR_PATH [key=value…] [--json].

Everything but `prune` and `copy` only reads; these two ask before they delete.
"""

import io
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from trainer import cli
from trainer.checkpoint import compare, lineage, select, transfer
from trainer.checkpoint.inspection import CheckpointStatus, inspect, is_complete
from trainer.checkpoint.lineage import MANIFEST, Attempt, Commit
from trainer.checkpoint.location import (
    Location,
    check_no_checkpoints_inside,
    find_location,
    numbers,
    open_location,
    split,
)
from trainer.checkpoint.manifest import Manifest, TensorEntry, is_void
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard import DTYPES, element_count
from trainer.cli import Arguments
from trainer.config.schema import ObjectStore
from trainer.core import intervals
from trainer.core.formatting import age, ask, iso, pluralize, progress, short_repr, size, table
from trainer.errors import (
    DONE,
    FAILURE,
    CheckpointError,
    ConfigError,
    closest,
)
from trainer.storage import Store, local_path, open_store

_USAGE = """usage: python -m trainer.checkpoints VERB PATH [key=value…] [--json]
  list PATH                     steps, with size, age, metric, ranks and state
  show PATH [step=…]            what is in one checkpoint
  verify PATH [step=…]          read every byte; names the first damaged tensor (default: all steps)
  diff PATH OTHER [step=…]      what differs between two places, or, with one PATH and step=A,B,
                                between two steps of it
  prune PATH [keep_last=…] [keep_best=…] [keep_every_steps=…]
                                delete what is not to be kept (default: what the run's own
                                configuration says), and litter
  copy PATH TARGET [step=…]     copy, verified, into another directory or bucket (default: all);
                                DCP folders, torch.save and safetensors files become checkpoints
  PATH    directory of a run, a folder of checkpoints, or one of them; local, s3://… and the like
  step    latest, best, all, or a number (default latest, where nothing else is said)
  --json  one JSON object on standard output instead of text
  --yes   delete without asking
  store.endpoint_url=… and the other store.* settings as trainer.run has them
exit codes: 0 done (diff: equal), 1 damage, or a difference, 2 not understood, nothing done"""

_OPTIONS = {
    "list": {},
    "show": {"step": "latest"},
    "verify": {"step": "all"},
    "diff": {"step": "latest"},
    "prune": {"keep_last": "", "keep_best": "", "keep_every_steps": ""},
    "copy": {"step": "all"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    stays = "interrupted; what was copied or deleted before stays so"
    return cli.command(argv, _USAGE, _verb, interrupted=stays)


def _verb(argv: list[str]) -> int:
    verb, rest = argv[0], argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if verb not in _VERBS:
        raise ConfigError(f"there is no verb {verb!r}{closest(verb, _VERBS)}\n{_USAGE}")
    flags = ["--json", "--yes"] if verb in ("prune", "copy") else ["--json"]
    places = {"diff": (1, 2), "copy": (2,)}.get(verb, (1,))
    given = cli.parse(rest, _USAGE, options=_OPTIONS[verb], flags=flags, places=places)
    code, content, text = _VERBS[verb](given)
    if "--json" in given.flags:
        text = json.dumps(_strict(content), indent=1, ensure_ascii=False)
    print(text, flush=True)
    return code


def _open(url: str, settings: ObjectStore) -> Location:
    """Open a location; the error for another program's checkpoint advises how to use it.

    Raises:
        ConfigError: the path has no Perdure checkpoint.
    """
    location = find_location(url, settings)
    if location is not None:
        return location
    from trainer.importing.formats import open_foreign  # imports torch's own formats

    external = open_foreign(url, settings)
    if external is not None:
        raise ConfigError(
            f"{url} is {external.kind}: convert it with `python -m trainer.checkpoints copy {url} "
            f"FOLDER`, or start a run from its weights with init.weights={url}"
        )
    return open_location(url, settings)


_Answer = tuple[int, Mapping[str, Any], str]
"""Exit code, what `--json` prints, and what is printed without."""


def _strict(value: Any) -> Any:
    """Return a value as JSON can have it; what it cannot have, as Python writes it."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    is_plain = value is None or type(value) in (bool, int, str)
    return value if is_plain or (type(value) is float and isfinite(value)) else repr(value)


# --- list and show -----------------------------------------------------------------------------


def _list(given: Arguments) -> _Answer:
    place = _open(given.places[0], given.store)
    survey = inspect(place)
    rows = [["step", "attempt", "size", "age", "ranks", "state", "metrics"]]
    for found in survey:
        made = found.manifest
        rows.append(
            [
                f"{found.commit.step:,}",
                str(found.commit.attempt),
                size(found.size_bytes),
                "" if found.saved_s is None else age(found.saved_s),
                "" if made is None else str(made.world_size),
                found.state + (f": {found.reason}" if found.reason else ""),
                ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items()),
            ]
        )
    content = {"path": place.url, "is_run": place.is_run, "checkpoints": [*map(_json, survey)]}
    text = table(rows) if survey else f"{place.url} has no checkpoints yet"
    return DONE, content, text


_JSON_STATES = {"intact": "whole", "orphaned": "litter"}
"""Values of the JSON format for states that have another name in text."""


def _json(found: CheckpointStatus) -> dict[str, Any]:
    made, saved_s = found.manifest, found.saved_s
    return {
        "step": found.commit.step,
        "attempt": found.commit.attempt,
        "folder": found.commit.folder,
        "state": _JSON_STATES.get(found.state, found.state),
        "why": found.reason or None,
        "bytes": found.size_bytes,
        "saved": None if saved_s is None else iso(saved_s),
        "metrics": found.metrics,
        "world_size": made.world_size if made else None,
        "epoch": made.epoch if made else None,
        "samples": made.samples if made else None,
    }


def _show(given: Arguments) -> _Answer:
    place = _open(given.places[0], given.store)
    commit = select.pick(place, given.options["step"])
    made = place.manifest(commit)
    objects = dict(compare.leaves(made.objects))
    content = {
        "path": place.url,
        "folder": commit.folder,
        **{key: getattr(made, key) for key in ("step", "epoch", "samples", "attempt")},
        "world_size": made.world_size,
        "versions": made.versions,
        "files": {name: file.bytes for name, file in made.files.items()},
        "tensors": {name: entry.to_json() for name, entry in made.tensors.items()},
        "objects": objects,
        "config": made.config,
    }
    sizes = {name: _nbytes(entry) for name, entry in made.tensors.items()}
    rows = [["tensor", "dtype", "shape", "bytes", "lies"]]
    for name, entry in made.tensors.items():
        rows.append([name, entry.dtype, _shape(entry), f"{sizes[name]:,}", _cut(entry, made)])
    versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
    lines = [
        f"step {made.step:,} of {place.url} ({commit.folder}), saved by attempt {made.attempt} on "
        f"{pluralize(made.world_size, 'rank')}",
        f"epoch {made.epoch:,}, {made.samples:,} samples; {versions}",
        f"{pluralize(len(made.files), 'file')}, {size(_files_bytes(made))}; "
        f"{pluralize(len(made.tensors), 'tensor')}, {size(sum(sizes.values()))}",
        "",
        table(rows),
        "",
        table([["value", ""], *([key, short_repr(value)] for key, value in objects.items())]),
    ]
    return DONE, content, "\n".join(lines)


def _nbytes(entry: TensorEntry) -> int:
    return 0 if entry.alias else element_count(entry.shape) * DTYPES[entry.dtype]


def _shape(entry: TensorEntry) -> str:
    return "" if entry.alias else "×".join(map(str, entry.shape)) or "()"


def _cut(entry: TensorEntry, made: Manifest) -> str:
    if entry.alias is not None:
        return f"as {entry.alias}"
    if entry.grid is not None:
        return f"cut {'×'.join(map(str, entry.grid))}"
    if entry.columns is not None:
        return f"in {len(entry.columns['file'])} parts"
    return f"in file {entry.file}" if len(made.files) > 1 else "whole"


# --- verify ------------------------------------------------------------------------------------


def _verify(given: Arguments) -> _Answer:
    place = _open(given.places[0], given.store)
    asked = given.options["step"]
    if asked == "all":
        survey = [found for found in inspect(place) if found.state in ("intact", "damaged")]
        if not survey:
            select.pick(place, "latest")  # says that there is none
    else:
        commit = select.pick(place, asked)
        made = place.manifest(commit)
        survey = [CheckpointStatus(commit, "intact", "", made, _files_bytes(made))]
    results, lines = [], []
    total = sum(found.size_bytes for found in survey)
    with progress("verifying", total, is_quiet="--json" in given.flags) as advance:
        for found in survey:
            began = time.monotonic()
            why, step = _damage(place, found, advance), found.commit.step
            results.append({"step": step, "folder": found.commit.folder, "damage": why or None})
            rate = found.size_bytes / (time.monotonic() - began)
            read = f"whole, {size(found.size_bytes)} read at {size(rate)}/s"
            lines.append(f"step {step:,}: " + (f"DAMAGED: {why}" if why else read))
    damaged = any(result["damage"] for result in results)
    content = {"path": place.url, "checkpoints": results}
    return FAILURE if damaged else DONE, content, "\n".join(lines)


def _files_bytes(made: Manifest) -> int:
    return sum(file.bytes for file in made.files.values())


def _damage(place: Location, found: CheckpointStatus, advance: Callable[[int], object]) -> str:
    """Return what is wrong with a checkpoint, or nothing."""
    if found.manifest is None:
        return found.reason
    try:
        place.reader(found.commit).verify(progress=advance)
    except CheckpointError as error:
        return str(error)
    return ""


# --- diff --------------------------------------------------------------------------------------


def _diff(given: Arguments) -> _Answer:
    steps = given.options["step"].split(",")
    if len(steps) * len(given.places) != 2 and (len(steps), len(given.places)) != (1, 2):
        raise ConfigError(f"give two paths, or one path and step=A,B\n{_USAGE}")
    places = [_open(path, given.store) for path in given.places]
    if len(places) == 1:
        places, commits = places * 2, [select.pick(places[0], step) for step in steps]
    else:
        commits = [select.pick(place, steps[0]) for place in places]
    made = [place.manifest(commit) for place, commit in zip(places, commits, strict=True)]
    readers = [place.reader(commit) for place, commit in zip(places, commits, strict=True)]
    total = sum(map(_nbytes, made[0].tensors.values()))
    with progress("comparing", total, is_quiet="--json" in given.flags) as advance:
        found = compare.compare((made[0], readers[0]), (made[1], readers[1]), advance)
    names = [
        f"{place.url} step {commit.step:,}" for place, commit in zip(places, commits, strict=True)
    ]
    content = {
        "first": names[0],
        "second": names[1],
        "is_equal": found.is_equal,
        "equal_tensors": found.equal,
        "changed": [asdict(change) for change in found.changed],
        "recast": found.recast,
        "only_first": found.only_first,
        "only_second": found.only_second,
        "values": found.values,
    }
    lines = [
        f"first   {names[0]}",
        f"second  {names[1]}",
        f"equal   {pluralize(found.equal, 'tensor')}",
    ]
    if found.changed:
        rows = [["changed tensor", "dtype", "shape", "elements", "largest change", "relative"]]
        for change in found.changed:
            share = f"{change.changed_elements:,} of {element_count(change.shape):,}"
            shape = "×".join(map(str, change.shape)) or "()"
            sizes = [share, f"{change.largest:.3g}", f"{change.relative:.3g}"]
            rows.append([change.name, change.dtype, shape, *sizes])
        lines += ["", table(rows)]
    if found.recast:
        lines += ["", table([["of another kind", "first", "second"], *map(list, found.recast)])]
    for title, only in (("first", found.only_first), ("second", found.only_second)):
        if only:
            lines += ["", table([[f"only in the {title}"], *([name] for name in only)])]
    if found.values:
        rows = [[key, short_repr(old), short_repr(new)] for key, old, new in found.values]
        lines += ["", table([["value", "first", "second"], *rows])]
    if found.is_equal:
        lines.append("nothing differs")
    return DONE if found.is_equal else FAILURE, content, "\n".join(lines)


# --- prune -------------------------------------------------------------------------------------


def _prune(given: Arguments) -> _Answer:
    place = _open(given.places[0], given.store)
    kept, going = _plan(place, given.options)
    rows = [["step", "attempt", "size", "state"]]
    for found in going:
        row = [f"{found.commit.step:,}", str(found.commit.attempt)]
        rows.append([*row, size(found.size_bytes), found.state])
    total_bytes = sum(found.size_bytes for found in going)
    content = {
        "path": place.url,
        "deleted": [_json(found) for found in going],
        "kept": sorted(kept),
        "freed_bytes": total_bytes,
    }
    if not going:
        return DONE, content, "nothing is to be deleted"
    is_agreed = "--yes" in given.flags
    ask(
        f"{table(rows)}\ndelete {pluralize(len(going), 'folder')} of {place.url}",
        is_agreed=is_agreed,
    )
    if _plan(place, given.options) != (kept, going):
        raise ConfigError(f"{place.url} has changed meanwhile; nothing was deleted: look again")
    records = lineage.records(place.store) if place.is_run else []
    newest = Attempt(max((record["attempt"] for record in records), default=0), "")
    for found in going:
        folder = found.commit.folder
        if found.state == "orphaned" and MANIFEST not in place.store.entries(folder):
            lineage.discard(place.store, folder, newest)
        else:
            lineage.delete(place.store, folder)
    return DONE, content, f"{pluralize(len(going), 'folder')} deleted, {size(total_bytes)} freed"


def _plan(place: Location, options: Mapping[str, str]) -> tuple[set[int], list[CheckpointStatus]]:
    """Return the steps that stay, and the folders that go."""
    survey = inspect(place)
    whole = [found for found in survey if found.state == "intact"]
    while whole and not is_complete(place.store, whole[-1]):
        whole.pop()  # it is not what the others may be deleted for
    if not whole:
        select.pick(place, "latest")  # says that there is none
        raise CheckpointError(f"{place.url}: no checkpoint is whole, so none is deleted")
    kept = _kept(place, whole, options)
    going = [found for found in whole if found.commit.step not in kept]
    return kept, going + [found for found in survey if found.state in ("abandoned", "orphaned")]


def _kept(
    place: Location, whole: Sequence[CheckpointStatus], options: Mapping[str, str]
) -> set[int]:
    """Return the steps that stay: what was asked, or else what the run's configuration says."""
    newest = whole[-1].manifest
    config = lineage.retention_of(newest) if newest else {}
    for key, text in options.items():
        if text:
            if not re.fullmatch("[0-9]{1,18}", text):
                raise ConfigError(f"{key}={text} is not a number")
            config[key] = int(text)
    if options["keep_best"] and not config.get("metric"):
        raise ConfigError(f"keep_best: {place.url} tracks no metric (checkpoint.metric is not set)")
    if not config:
        raise ConfigError(
            f"{place.url} has no configuration that says what to keep; say it: keep_last=2"
        )
    metric = str(config.get("metric") or "")
    values = {found.commit.step: found.metrics.get(metric) for found in whole}
    stale = intervals.stale(
        values,
        keep_last=config.get("keep_last", 2),
        keep_best=config.get("keep_best", 1) if metric else 0,
        mode=config.get("mode", "max"),
        keep_every_steps=config.get("keep_every_steps"),
    )
    kept = set(values) - set(stale)
    for record in lineage.records(place.store)[-1:] if place.is_run else ():
        if "ended" not in record and record.get("resumed_from"):
            kept.add(record["resumed_from"]["step"])  # it may be reading it
    return kept & set(values)


# --- copy --------------------------------------------------------------------------------------


def _copy(given: Arguments) -> _Answer:
    from trainer.importing.formats import open_foreign  # with torch's own formats

    source, target = given.places
    _refuse_overlap(source, target)
    foreign = open_foreign(source, given.store)
    if foreign is not None:
        store, folder = split(target, given.store)
        _make_room(store, folder, None, given)
        total = sum(
            element_count(shape) * dtype.itemsize for dtype, shape in foreign.tensors.values()
        )
        with progress("copying", total, is_quiet="--json" in given.flags) as advance:
            made = transfer.import_checkpoint(
                foreign, store, folder, step=numbers(folder)[0], progress=advance
            )
        content = {"source": source, "target": target, "copied": [made.step], "present": []}
        text = f"{target}: {len(made.tensors):,} tensors of {foreign.kind}"
        return DONE, content, text
    place = _open(source, given.store)
    asked = given.options["step"]
    commits = place.survey().commits if asked == "all" else [select.pick(place, asked)]
    if not commits:
        select.pick(place, "latest")  # says that there is none
    if place.is_one:
        targets = [(commits[0], *split(target, given.store))]
    else:
        store = open_store(target, given.store)
        targets = [(commit, store, commit.folder) for commit in commits]
    made_by = {commit: place.manifest(commit) for commit in commits}
    copied, present = [], []
    total = sum(map(_files_bytes, made_by.values()))
    with progress("copying", total, is_quiet="--json" in given.flags) as advance:
        if place.is_run:
            _copy_records(place.store, store)
        for commit, store, folder in targets:
            made = made_by[commit]
            if _make_room(store, folder, (place, commit), given):
                present.append(commit.step)
                advance(_files_bytes(made))
                continue
            transfer.copy_checkpoint(place.store, commit.folder, made, store, folder, advance)
            copied.append(commit.step)
    content = {"source": place.url, "target": target, "copied": copied, "present": present}
    text = f"{target}: {pluralize(len(copied), 'checkpoint')} copied"
    text += f", {len(present)} were there, whole" if present else ""
    return DONE, content, text


def _refuse_overlap(source: str, target: str) -> None:
    """Refuse a copy onto itself, into itself, or onto what it lies in."""
    one, other = (
        str(path.resolve()) if (path := local_path(url)) is not None else url.rstrip("/")
        for url in (source, target)
    )
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise ConfigError(f"{source} and {target} lie in one another; copy to a place of its own")


def _copy_records(source: Store, target: Store) -> None:
    """Bring a run's records of attempts, its configuration and its metrics to another place.

    Raises:
        ConfigError: that place is of another run, or of something else.
    """
    theirs = {record["attempt"]: record for record in lineage.records(target)}
    ours = {record["attempt"]: record for record in lineage.records(source)}
    for number, record in theirs.items():
        if ours.get(number, {}).get("token") != record.get("token"):
            raise ConfigError(
                f"{target.url} is another run, or has gone on by itself: its attempt {number} was "
                f"started {record.get('started')} on {record.get('host')}. Give another place"
            )
    keys = [
        key for key in source.entries("") if re.fullmatch(r"config\.yaml|metrics.*\.jsonl", key)
    ]
    keys += source.list("metrics")
    found = set(target.entries("")) | set(target.list("metrics"))
    if not theirs and found & set(keys):
        raise ConfigError(
            f"{target.url} is no run, and has {sorted(found & set(keys))[0]} in it; give a folder "
            "of its own"
        )
    for key in keys:
        if key not in found or target.size(key) <= source.size(key):  # metrics only grow
            target.replace(key, source.read(key))
    for number, record in ours.items():
        if number not in theirs or ("ended" in record and "ended" not in theirs[number]):
            lineage.restore_record(target, record)


def _make_room(
    store: Store, folder: str, source: tuple[Location, Commit] | None, given: Arguments
) -> bool:
    """Say whether the checkpoint is there already, whole; what else is there goes, if one may.

    Nothing goes before every byte of what is to come has been found right.
    """
    check_no_checkpoints_inside(store, folder)
    if MANIFEST not in store.entries(folder):
        return False
    here, is_agreed = f"{store.url}/{folder}", "--yes" in given.flags
    found = store.read(f"{folder}/{MANIFEST}")
    if source is not None and found == source[0].store.read(source[1].manifest_key):
        try:
            Reader(store, folder, Location(here, store, [folder]).read(folder)).verify()
        except CheckpointError as error:
            ask(f"{here} is damaged ({error}); delete it and copy it anew", is_agreed=is_agreed)
        else:
            return True
    elif not is_void(found):
        question = f"{here} is another checkpoint; delete it and put this one in its place"
        ask(question, is_agreed=is_agreed)
    if source is not None:
        source[0].reader(source[1]).verify()
    lineage.delete(store, folder)
    return False


_VERBS: Mapping[str, Callable[[Arguments], _Answer]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "diff": _diff,
    "prune": _prune,
    "copy": _copy,
}


if __name__ == "__main__":
    sys.exit(main())
