"""The newest checkpoint of a run as NumPy arrays, every byte verified, without Perdure.

python read_checkpoint.py RUN     needs numpy and xxhash; see docs/checkpoint-format.md
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_hexdigest as digest

KINDS = {"F": (2, 4, 8), "I": (1, 2, 4, 8), "U": (1, 2, 4, 8), "C": (8, 16)}
DTYPES = {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind, sizes in KINDS.items() for n in sizes}
DTYPES |= {"BOOL": "?", "BF16": "<u2", "BITS16": "<u2", "C32": "<u4"}  # others: a byte


def newest(run: Path) -> Path:
    """Return the folder of the checkpoint from which the run would resume."""
    records = [json.loads(path.read_bytes()) for path in (run / "attempts").glob("*[0-9].json")]
    starts = [(r["attempt"], r["resumed_from"]["step"]) for r in records if r.get("resumed_from")]
    candidates = []
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        folder, name = manifest.parent, re.fullmatch(r"step-(\d+)\.(\d+)", manifest.parent.name)
        is_void = manifest.read_bytes().startswith(b'{"void":')
        if name and not is_void and not (folder / "damaged.json").exists():
            step, attempt = int(name[1]), int(name[2])
            if all(b <= attempt or origin >= step for b, origin in starts):
                candidates.append((step, attempt, folder))
    return max(candidates)[2]


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the manifest and all tensors by name; other dtypes than NumPy's as their bits."""
    data = (folder / "manifest.json").read_bytes()
    check(data[-34:] == f',\n"checksum":"{digest(data[:-34])}"\n}}\n'.encode(), "manifest.json")
    manifest = json.loads(data)
    stored = {name: e for name, e in manifest["tensors"].items() if "alias" not in e}
    tensors = {n: np.empty(e["shape"], DTYPES.get(e["dtype"], "u1")) for n, e in stored.items()}
    views = [{} for _ in manifest["files"]]  # of each file: key -> memory for its data
    for name, entry in stored.items():
        for file, offsets, lengths in pieces(entry, manifest.get("file_lists")):
            is_plain = "file" in entry or (manifest["version"] == 1 and lengths == entry["shape"])
            key = name if is_plain else f"{name}@{','.join(map(str, offsets))}"
            box = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
            if 0 not in lengths:
                views[file][key] = tensors[name][(*box, ...)]
    for view, (file, facts) in zip(views, manifest["files"].items(), strict=True):
        for key, content in shard(folder / file, facts, manifest, view):
            if key in view:
                view[key][...] = np.frombuffer(content, view[key].dtype).reshape(view[key].shape)
    return manifest, {n: tensors[e.get("alias", n)] for n, e in manifest["tensors"].items()}


def pieces(entry: dict, file_lists: list | None):
    """Return file number, offsets and lengths of each piece of a tensor."""
    if "file" in entry:
        return [(entry["file"], [0] * len(entry["shape"]), entry["shape"])]
    if "columns" in entry:
        return zip(*(entry["columns"][c] for c in ("file", "offsets", "lengths")), strict=True)
    shape, cells = np.array(entry["shape"]), np.array(list(np.ndindex(*entry["grid"])))
    steps = np.maximum(-(-shape // entry["grid"]), 1)
    offsets = np.minimum(cells * steps, shape)
    files = file_lists[entry["file_list"]] if "file_list" in entry else range(len(cells))
    return zip(files, offsets.tolist(), np.minimum(steps, shape - offsets).tolist(), strict=True)


def shard(path: Path, facts: dict, manifest: dict, view: dict[str, np.ndarray]):
    """Yield (key, bytes) of everything in a file, verified."""
    data, start, block_bytes = path.read_bytes(), facts["header_bytes"], manifest["block_bytes"]
    is_sound = len(data) == facts["bytes"] and digest(data[:start]) == facts["header_checksum"]
    check(is_sound, path.name)
    if manifest["version"] == 1:
        header = json.loads(data[8:start])
        expected = re.findall("." * 16, header.pop("__metadata__")["blocks"])
        ends = {key: start + entry["data_offsets"][1] for key, entry in header.items()}
    else:
        ends, stop = {}, start
        for key in sorted(view, key=lambda key: (-view[key].itemsize, key)):
            ends[key] = stop = stop + view[key].nbytes
        ends["__padding__"] = stop = stop + (start - stop) % 8
        check(digest(data[stop:]) == facts["checksums_checksum"], path.name)
        expected = [f"{checksum:016x}" for checksum in np.frombuffer(data[stop:], "<u8")]
    for key, stop in ends.items():
        for at in range(start, stop, block_bytes):
            block = data[at : min(at + block_bytes, stop)]
            check(digest(block) == expected.pop(0), f"{path.name}: {key}")
        yield key, data[start:stop]
        start = stop


def check(is_equal: bool, name: str) -> None:
    """Exit if the bytes have another checksum or size."""
    if not is_equal:
        sys.exit(f"{name} is damaged")


if __name__ == "__main__":
    manifest, tensors = read(newest(Path(sys.argv[1])))
    print(f"step {manifest['step']}, {len(tensors)} tensors")
    for name, array in tensors.items():
        print(f"  {name}  {array.dtype}  {list(array.shape)}")
