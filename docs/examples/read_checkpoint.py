"""The newest checkpoint of a run as NumPy arrays, every byte verified, without Perdure.

python read_checkpoint.py RUN     needs numpy and xxhash; see docs/checkpoint-format.md
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_hexdigest as digest

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?", "C64": "<c8"}
DTYPES |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}


def newest(run: Path) -> Path:
    """Return the folder of the checkpoint from which the run would resume."""
    paths = (run / "attempts").glob("*[0-9].json")
    records = {int(path.stem): json.loads(path.read_bytes()) for path in paths}
    starts = [(a, r["resumed_from"]["step"]) for a, r in records.items() if r.get("resumed_from")]
    candidates = []
    for folder in (run / "checkpoints").iterdir():
        name, manifest = re.fullmatch(r"step-(\d+)\.(\d+)", folder.name), folder / "manifest.json"
        if not name or not manifest.exists() or (folder / "damaged.json").exists():
            continue
        step, attempt = int(name[1]), int(name[2])
        is_void = b'"void"' in manifest.read_bytes()[:9]
        if not is_void and all(b <= attempt or origin >= step for b, origin in starts):
            candidates.append((step, attempt, folder))
    return max(candidates)[2]


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the manifest and all tensors by name; bfloat16 comes as the uint16 of its bits."""
    data = (folder / "manifest.json").read_bytes()
    manifest = json.loads(data)
    check(manifest["checksum"], data.rpartition(b',\n"checksum":')[0], "manifest.json")
    entries, tensors = manifest["tensors"], {}
    for name, entry in entries.items():
        if "alias" not in entry:
            is_c128 = entry["dtype"] == "C128"  # stored as F64 with a last axis of 2
            shape = [*entry["shape"], 2] if is_c128 else entry["shape"]
            tensors[name] = np.empty(shape, DTYPES["F64" if is_c128 else entry["dtype"]])
    for file, facts in manifest["files"].items():
        for key, array in shard(folder / file, facts, manifest["block_bytes"]):
            name, _, offsets = key.rpartition("@") if key not in tensors else (key, "", "")
            corner = [int(o) for o in offsets.split(",")] if offsets else [0] * array.ndim
            corner += [0] * (array.ndim - len(corner))
            box = tuple(slice(o, o + n) for o, n in zip(corner, array.shape, strict=True))
            tensors[name][box] = array
    aliases = {name: tensors[e["alias"]] for name, e in entries.items() if "alias" in e}
    return manifest, {**tensors, **aliases}


def shard(path: Path, facts: dict, block_bytes: int):
    """Yield (key, array) of every tensor, or part of one, in a file."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    check(facts["header_checksum"], data[: facts["header_bytes"]], path.name)
    blocks, block = header.pop("__metadata__")["blocks"], 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (facts["header_bytes"] + offset for offset in entry["data_offsets"])
        for at in range(start, stop, block_bytes):
            expected, block = blocks[16 * block : 16 * block + 16], block + 1
            check(expected, data[at : min(at + block_bytes, stop)], f"{path.name}: {key}")
        yield key, np.frombuffer(data[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])


def check(expected: str, data: bytes, name: str) -> None:
    """Exit if the bytes have another checksum."""
    if digest(data) != expected:
        sys.exit(f"{name} is damaged")


if __name__ == "__main__":
    manifest, tensors = read(newest(Path(sys.argv[1])))
    print(f"step {manifest['step']}, {len(tensors)} tensors")
    for name, array in tensors.items():
        print(f"  {name}  {array.dtype}  {list(array.shape)}")
