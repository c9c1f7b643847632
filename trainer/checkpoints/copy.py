"""`copy`: copy checkpoints, verified, and convert those of other programs."""

import re
from typing import TYPE_CHECKING

from trainer.checkpoint import lineage, select, transfer
from trainer.checkpoint.lineage import MANIFEST, Commit
from trainer.checkpoint.location import Location, check_no_checkpoints_inside, numbers, split
from trainer.checkpoint.manifest import is_void
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard import element_count
from trainer.checkpoints.answer import AllSteps, Answer, files_bytes, open_checkpoints
from trainer.cli import Arguments
from trainer.core.formatting import ask, pluralize, progress
from trainer.errors import DONE, CheckpointError, ConfigError
from trainer.storage import Store, local_path, open_store

if TYPE_CHECKING:
    from trainer.importing.formats import Source


def copy(arguments: Arguments[AllSteps]) -> Answer:
    """Copy to a target; return the copied steps, and those that the target had."""
    from trainer.importing.formats import open_external  # slow to import

    source, target = arguments.places
    _check_no_overlap(source, target)
    external = open_external(source, arguments.store)
    if external is not None:
        return _convert(external, arguments)
    location = open_checkpoints(source, arguments.store)
    step = arguments.options.step
    commits = location.survey().commits if step == "all" else [select.pick(location, step)]
    if not commits:
        select.pick(location, "latest")  # raises: no checkpoint
    if location.is_one:
        targets = [(commits[0], *split(target, arguments.store))]
    else:
        store = open_store(target, arguments.store)
        targets = [(commit, store, commit.folder) for commit in commits]
    manifests = {commit: location.manifest(commit) for commit in commits}
    copied, present = [], []
    total_bytes = sum(map(files_bytes, manifests.values()))
    with progress("copying", total_bytes, is_quiet="--json" in arguments.flags) as advance:
        if location.is_run:
            _copy_records(location.store, store)
        for commit, store, folder in targets:
            manifest = manifests[commit]
            if _prepare(store, folder, (location, commit), arguments):
                present.append(commit.step)
                advance(files_bytes(manifest))
                continue
            transfer.copy_checkpoint(
                location.store, commit.folder, manifest, store, folder, advance
            )
            copied.append(commit.step)
    content = {"source": location.url, "target": target, "copied": copied, "present": present}
    text = f"{target}: {pluralize(len(copied), 'checkpoint')} copied"
    text += f", {len(present)} already there and intact" if present else ""
    return DONE, content, text


def _convert(external: "Source", arguments: Arguments[AllSteps]) -> Answer:
    """Write another program's checkpoint in Perdure's format."""
    source, target = arguments.places
    store, folder = split(target, arguments.store)
    _prepare(store, folder, None, arguments)
    sizes = (element_count(shape) * dtype.itemsize for dtype, shape in external.tensors.values())
    with progress("copying", sum(sizes), is_quiet="--json" in arguments.flags) as advance:
        manifest = transfer.import_checkpoint(
            external, store, folder, step=numbers(folder)[0], progress=advance
        )
    content = {"source": source, "target": target, "copied": [manifest.step], "present": []}
    return DONE, content, f"{target}: {len(manifest.tensors):,} tensors of {external.kind}"


def _check_no_overlap(source: str, target: str) -> None:
    """Raise ConfigError if one path contains the other."""
    one, other = (
        str(path.resolve()) if (path := local_path(url)) is not None else url.rstrip("/")
        for url in (source, target)
    )
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise ConfigError(f"{source} and {target} overlap; choose a separate target")


def _copy_records(source: Store, target: Store) -> None:
    """Copy a run's attempt records, configuration, metrics and save durations.

    Raises:
        ConfigError: the target belongs to another run, or is not a run.
    """
    stored = {record["attempt"]: record for record in lineage.records(target)}
    records = {record["attempt"]: record for record in lineage.records(source)}
    for number, record in stored.items():
        if records.get(number, {}).get("token") != record.get("token"):
            raise ConfigError(
                f"{target.url} belongs to another run, or was continued separately: its attempt "
                f"{number} was started {record.get('started')} on {record.get('host')}. Choose "
                "another target"
            )
    pattern = r"config\.yaml|(metrics|saves).*\.jsonl"
    keys = [key for key in source.entries("") if re.fullmatch(pattern, key)]
    keys += [*source.list("metrics"), *source.list("saves")]
    present = {*target.entries(""), *target.list("metrics"), *target.list("saves")}
    if not stored and present & set(keys):
        raise ConfigError(
            f"{target.url} is not a run, but contains {sorted(present & set(keys))[0]}; choose "
            "another folder"
        )
    for key in keys:
        if key not in present or target.size(key) <= source.size(key):  # files of lines only grow
            target.replace(key, source.read(key))
    for number, record in records.items():
        if number not in stored or ("ended" in record and "ended" not in stored[number]):
            lineage.restore_record(target, record)


def _prepare(
    store: Store,
    folder: str,
    source: tuple[Location, Commit] | None,
    arguments: Arguments[AllSteps],
) -> bool:
    """Delete another or a damaged checkpoint in the target folder, after a confirmation.

    Nothing is deleted before every byte of the source is verified.

    Returns:
        Whether the folder has the same checkpoint already, intact.
    """
    check_no_checkpoints_inside(store, folder)
    if MANIFEST not in store.entries(folder):
        return False
    url, is_agreed = f"{store.url}/{folder}", "--yes" in arguments.flags
    data = store.read(f"{folder}/{MANIFEST}")
    if source is not None and data == source[0].store.read(source[1].manifest_key):
        try:
            Reader(store, folder, lineage.manifest_in(store, folder)).verify()
        except CheckpointError as error:
            ask(f"{url} is damaged ({error}); delete it and copy it again", is_agreed=is_agreed)
        else:
            return True
    elif not is_void(data):
        ask(f"{url} is another checkpoint; delete and replace it", is_agreed=is_agreed)
    if source is not None:
        source[0].reader(source[1]).verify()
    lineage.delete(store, folder)
    return False
