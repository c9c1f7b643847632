"""`show`: files, tensors and values of one checkpoint."""

from trainer.checkpoint import select
from trainer.checkpoint.manifest import Manifest, TensorEntry
from trainer.checkpoint.values import leaves
from trainer.checkpoints.answer import Answer, OneStep, files_bytes, open_checkpoints, tensor_bytes
from trainer.cli import Arguments
from trainer.core.formatting import pluralize, short_repr, size, table
from trainer.errors import DONE


def show(arguments: Arguments[OneStep]) -> Answer:
    """Return the contents of a manifest."""
    location = open_checkpoints(arguments.places[0], arguments.store)
    commit = select.pick(location, arguments.options.step)
    manifest = location.manifest(commit)
    objects = dict(leaves(manifest.objects))
    lists: dict[tuple[int, ...], int] = {}
    content = {
        "path": location.url,
        "folder": commit.folder,
        **{key: getattr(manifest, key) for key in ("step", "epoch", "samples", "attempt")},
        "world_size": manifest.world_size,
        "versions": manifest.versions,
        "files": {name: file.bytes for name, file in manifest.files.items()},
        "tensors": {name: entry.to_json(lists) for name, entry in manifest.tensors.items()},
        "file_lists": list(lists),
        "objects": objects,
        "config": manifest.config,
    }
    sizes = {name: tensor_bytes(entry) for name, entry in manifest.tensors.items()}
    rows = [["tensor", "dtype", "shape", "bytes", "layout"]]
    for name, entry in manifest.tensors.items():
        shape = "" if entry.alias else "×".join(map(str, entry.shape)) or "()"
        rows.append([name, entry.dtype, shape, f"{sizes[name]:,}", _layout(entry, manifest)])
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    lines = [
        f"step {manifest.step:,} of {location.url} ({commit.folder}), saved by attempt "
        f"{manifest.attempt} on {pluralize(manifest.world_size, 'rank')}",
        f"epoch {manifest.epoch:,}, {manifest.samples:,} samples; {versions}",
        f"{pluralize(len(manifest.files), 'file')}, {size(files_bytes(manifest))}; "
        f"{pluralize(len(manifest.tensors), 'tensor')}, {size(sum(sizes.values()))}",
        "",
        table(rows),
        "",
        table([["value", ""], *([key, short_repr(value)] for key, value in objects.items())]),
    ]
    return DONE, content, "\n".join(lines)


def _layout(entry: TensorEntry, manifest: Manifest) -> str:
    if entry.alias is not None:
        return f"alias of {entry.alias}"
    if entry.grid is not None:
        return f"sharded {'×'.join(map(str, entry.grid))}"
    if entry.columns is not None:
        return f"in {len(entry.columns['file'])} parts"
    return f"in file {entry.file}" if len(manifest.files) > 1 else "unsharded"
