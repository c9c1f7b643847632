"""Checkpoint manifest: golden bytes, round trips, and rejection of hostile content."""

import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.checkpoint import manifest
from trainer.checkpoint.box import Box
from trainer.checkpoint.manifest import Manifest, ShardFile, TensorEntry
from trainer.checkpoint.values import TensorRef
from trainer.errors import CheckpointError

GOLDEN = Path(__file__).parents[2] / "golden" / "manifest.json"


def sample() -> Manifest:
    """Return a manifest that uses every feature of the format."""
    names = [
        manifest.shard_name(rank=rank, world_size=4, token="9f2c41aa", save=7) for rank in range(4)
    ]
    return Manifest(
        step=1200,
        epoch=3,
        samples=76800,
        attempt=3,
        token="9f2c41aa",
        save=7,
        world_size=4,
        versions={"torch": "2.11.0"},
        tensors={
            "model.weight": TensorEntry(dtype="BF16", shape=(4, 3), file=2),
            "model.tied": TensorEntry(alias="model.weight"),
            "model.sharded": TensorEntry(dtype="F32", shape=(5, 2), grid=(4, 1)),
            "model.cut": TensorEntry(
                dtype="I8",
                shape=(2, 3),
                columns={"file": [0, 3], "offsets": [[0, 0], [0, 1]], "lengths": [[2, 1], [2, 2]]},
            ),
            "optimizer.step": TensorEntry(dtype="F32", shape=(), file=0),
            "empty": TensorEntry(dtype="C128", shape=(0, 7), file=1),
        },
        files={
            name: ShardFile(8192 + rank, 4096, f"{rank:016x}") for rank, name in enumerate(names)
        },
        objects={
            "scheduler": {"milestones": Counter({3: 1, 6: 2}), "best": -math.inf},
            "tree": [(1, 2.5), None, True, b"\x00\xff", 1 + 2j, {5}, OrderedDict(a=TensorRef("t"))],
            "numpy": np.float32(1.5),
            "naïve": "Ünïcode \U0001f600",
        },
        config={"optimizer": {"lr": 0.1, "_target_": "torch.optim.SGD"}},
    )


def sealed(top: dict[str, Any] | str) -> bytes:
    """Serialize any content as a manifest with a correct checksum, as documented."""
    lines = top if isinstance(top, str) else ",\n".join(
        f"{json.dumps(key)}:{json.dumps(value)}" for key, value in top.items()
    )  # fmt: skip
    body = ("{\n" + lines).encode()
    return body + b',\n"checksum":"%s"\n}\n' % xxhash.xxh3_64_hexdigest(body).encode()


def parsed_golden() -> dict[str, Any]:
    top = json.loads(GOLDEN.read_bytes())
    del top["checksum"]
    return top


# --- the format ----------------------------------------------------------------------------------


def test_to_bytes_matches_golden_manifest():
    assert manifest.to_bytes(sample()) == GOLDEN.read_bytes()


def test_from_bytes_reads_golden_manifest():
    assert manifest.from_bytes(GOLDEN.read_bytes(), "golden") == sample()


def test_golden_manifest_is_json_with_checksum_last():
    data = GOLDEN.read_bytes()
    body = data[: data.index(b',\n"checksum"')]
    top = json.loads(data)
    assert list(top)[-1] == "checksum"
    assert top["checksum"] == xxhash.xxh3_64_hexdigest(body)
    assert (top["format"], top["version"], top["algorithm"]) == (
        "perdure-checkpoint",
        1,
        "xxh3_64",
    )


def test_from_bytes_reads_manifest_written_by_hand():
    assert manifest.from_bytes(sealed(parsed_golden()), "golden") == sample()


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.integers(0, (1 << 63) - 1), min_size=6, max_size=6),
    objects=st.dictionaries(st.text(), st.integers() | st.text() | st.floats(allow_nan=False)),
    names=st.lists(st.text(), unique=True, max_size=4),
)
def test_round_trip_preserves_numbers_names_and_values(numbers, objects, names):
    keys = ("step", "epoch", "samples", "attempt", "save", "world_size")
    entry = TensorEntry(dtype="F32", shape=(2,), file=0)
    original = replace(
        sample(),
        **dict(zip(keys, numbers, strict=True)),
        objects=objects,
        tensors=dict.fromkeys(names, entry),
    )
    assert manifest.from_bytes(manifest.to_bytes(original), "x") == original


def test_round_trip_preserves_surrogate_escapes():
    name = b"/data/\xff".decode("utf-8", "surrogateescape")  # a path, as Python gives it
    original = replace(sample(), config={"data": {"dir": name}})
    assert manifest.from_bytes(manifest.to_bytes(original), "x") == original


@given(step=st.integers(0, 10**12), attempt=st.integers(1, 10**6))
@settings(max_examples=50, deadline=None)
def test_parse_folder_inverts_folder_name(step, attempt):
    assert manifest.parse_folder(manifest.folder_name(step, attempt)) == (step, attempt)


@pytest.mark.parametrize(
    "name",
    ["", "step-1.1", "step-00000001", "step-00000001.0001x", "step-00000001.0001\n",
     "../step-00000001.0001", "step--0000001.0001"],
)  # fmt: skip
def test_other_folder_names_are_not_checkpoints(name):
    assert manifest.parse_folder(name) is None


# --- damage --------------------------------------------------------------------------------------


def rejection(data: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        manifest.from_bytes(data, "here/manifest.json")
    assert str(caught.value).startswith("here/manifest.json: ")
    return caught.value


def test_from_bytes_rejects_every_flipped_bit():
    data = GOLDEN.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[position] ^= 1 << bit
            rejection(bytes(altered))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_from_bytes_rejects_every_replaced_byte(data):
    golden = GOLDEN.read_bytes()
    position = data.draw(st.integers(0, len(golden) - 1) | st.integers(len(golden) - 40, 99999))
    position = min(position, len(golden) - 1)
    altered = bytearray(golden)
    altered[position] ^= data.draw(st.integers(1, 255))
    rejection(bytes(altered))


def test_from_bytes_rejects_every_truncation():
    data = GOLDEN.read_bytes()
    for length in range(len(data)):
        rejection(data[:length])


@pytest.mark.parametrize("extra", [b"\n", b" ", b"\0", b"{}", GOLDEN.read_bytes()])
def test_from_bytes_rejects_extra_bytes(extra):
    rejection(GOLDEN.read_bytes() + extra)
    rejection(extra + GOLDEN.read_bytes())


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_from_bytes_rejects_arbitrary_bytes(data):
    rejection(data)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_from_bytes_rejects_other_encodings(encoding):
    rejection(GOLDEN.read_text("utf-8").encode(encoding))


def test_from_bytes_rejects_void_manifest():
    for data in (manifest.void_bytes(7), manifest.void_bytes(7) + b"\n"):
        assert manifest.is_void(data)
        assert "abandoned" in str(rejection(data))


@pytest.mark.parametrize("data", [b"", b"{}", b'{"void":-1}', b'{"void":1,"a":2}', b'{"void":""}'])
def test_other_small_objects_are_not_void(data):
    assert not manifest.is_void(data)
    rejection(data)


def test_from_bytes_rejects_oversized_manifest():
    data = memoryview(bytes(manifest.MAX_MANIFEST_BYTES + 1))
    assert "exceed the maximum" in str(rejection(data))


@pytest.mark.parametrize("brackets", [b"[", b'{"a":', b'[{"a":'])
def test_from_bytes_rejects_deep_nesting(brackets):
    rejection(brackets * 100_000)


# --- hostile content with a correct checksum -----------------------------------------------------


def test_from_bytes_rejects_deep_nesting_with_correct_checksum():
    lines = ",\n".join(
        f"{json.dumps(key)}:{json.dumps(value)}"
        for key, value in parsed_golden().items()
        if key != "objects"
    )
    for depth in (500, 990, 100_000):
        for opening, closing in (("[", "]"), ('{"$tuple":[', "]}"), ('{"a":', "}")):
            nested = opening * depth + ("1" if "a" in opening else "") + closing * depth
            rejection(sealed(f'{lines},\n"objects":{nested}'))


@pytest.mark.parametrize("key", ["step", "checksum", "objects"])
def test_from_bytes_rejects_duplicate_key(key):
    text = ",\n".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in parsed_golden().items())
    assert "duplicate key" in str(rejection(sealed(f'{text},\n"{key}":1,\n"{key}":1')))


def test_from_bytes_rejects_duplicate_tensor_or_file():
    text = sealed(parsed_golden()).decode().partition(',\n"checksum"')[0].removeprefix("{\n")
    for name in ('"empty":', '"r00000-of-00004-9f2c41aa-7.safetensors":'):
        start = text.index(name)
        entry = text[start : text.index("}", start) + 1]
        rejection(sealed(text.replace(entry, f"{entry}, {entry}")))


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1" * 5000])
def test_from_bytes_rejects_non_json_numbers(constant):
    text = ",\n".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in parsed_golden().items())
    rejection(sealed(text.replace('"step":1200', f'"step":{constant}')))


Edit = Callable[[dict[str, Any]], Any]


def set_at(*path: str | int, to: Any) -> Edit:
    def edit(top: dict[str, Any]) -> None:
        node: Any = top
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to

    return edit


def rename_file(name: str) -> Edit:
    def edit(top: dict[str, Any]) -> None:
        files = top["files"]
        files[name] = files.pop(next(iter(files)))

    return edit


NOT_NATURAL = [-1, 1 << 63, 10**40, 1.0, 1.5, 1e400, True, None, "1", [1], {}]
FILE = "r00000-of-00004-9f2c41aa-7.safetensors"
HOSTILE: dict[str, Edit] = {
    "other version": set_at("version", to=2),
    "no version": lambda top: top.pop("version"),
    "other format": set_at("format", to="tarball"),
    "no format": lambda top: top.pop("format"),
    "other algorithm": set_at("algorithm", to="md5"),
    **{f"without {k}": (lambda top, k=k: top.pop(k)) for k in parsed_golden()},
    **{f"{k} null": set_at(k, to=None) for k in parsed_golden() if k != "token"},
    **{
        f"{k} a {type(v).__name__}": set_at(k, to=v)
        for k in ("files", "tensors", "objects", "config", "versions")
        for v in ([1], 5, "text")
    },
    **{f"file named {name!r}": rename_file(name) for name in (
        "../x", "/etc/passwd", "a/b", "..", "", "manifest.json", f"../{FILE}", f"{FILE}\n",
        f"a/{FILE}", f"/{FILE}", FILE.replace("9f2c41aa", "9f2c41aA"), f"{FILE}\0", f".{FILE}",
        FILE.replace("-7", "-../7"), FILE.replace("/", "\\"),
    ) if name != FILE},
    **{
        f"{'.'.join(map(str, path))} = {value!r}": set_at(*path, to=value)
        for path in (
            ("step",), ("epoch",), ("samples",), ("attempt",), ("save",), ("world_size",),
            ("block_bytes",), ("files", FILE, "bytes"), ("files", FILE, "header_bytes"),
            ("tensors", "model.weight", "shape", 0), ("tensors", "model.weight", "file"),
            ("tensors", "model.sharded", "grid", 0),
            ("tensors", "model.cut", "columns", "file", 0),
            ("tensors", "model.cut", "columns", "offsets", 0, 0),
            ("tensors", "model.cut", "columns", "lengths", 0, 0),
        )
        for value in NOT_NATURAL
    },
    "block_bytes 0": set_at("block_bytes", to=0),
    "block_bytes above 1 MiB": set_at("block_bytes", to=(1 << 20) + 1),
    "unknown dtype": set_at("tensors", "model.weight", "dtype", to="F128"),
    "dtype a list": set_at("tensors", "model.weight", "dtype", to=["F32"]),
    "entry a list": set_at("tensors", "model.weight", to=[]),
    "entry a text": set_at("tensors", "model.weight", to="F32"),
    "file entry a list": set_at("files", FILE, to=[]),
    "shape a number": set_at("tensors", "model.weight", "shape", to=3),
    "shape a text": set_at("tensors", "model.weight", "shape", to="43"),
    "a shape larger than the files": set_at("tensors", "model.weight", "shape", to=[1 << 20] * 3),
    "file beyond the last": set_at("tensors", "model.weight", "file", to=4),
    "no place": lambda top: top["tensors"]["model.weight"].pop("file"),
    "two places": set_at("tensors", "model.weight", "grid", to=[1, 1]),
    "alias to nothing": set_at("tensors", "model.tied", "alias", to="model.absent"),
    "alias to itself": set_at("tensors", "model.tied", "alias", to="model.tied"),
    "alias to an alias": set_at("tensors", "second", to={"alias": "model.tied"}),
    "alias a number": set_at("tensors", "model.tied", "alias", to=5),
    "grid of zero": set_at("tensors", "model.sharded", "grid", to=[0, 1]),
    "grid of other rank": set_at("tensors", "model.sharded", "grid", to=[4]),
    "grid of too many": set_at("tensors", "model.sharded", "grid", to=[5, 1]),
    "grid of huge": set_at("tensors", "model.sharded", "grid", to=[1 << 62, 1 << 62]),
    "columns a list": set_at("tensors", "model.cut", "columns", to=[1]),
    "columns empty": set_at("tensors", "model.cut", "columns", to={}),
    "columns uneven": set_at("tensors", "model.cut", "columns", "file", to=[0]),
    "columns that overlap": set_at("tensors", "model.cut", "columns", "offsets", 1, to=[0, 0]),
    "column outside": set_at("tensors", "model.cut", "columns", "offsets", 1, to=[0, 2]),
    "column of other rank": set_at("tensors", "model.cut", "columns", "offsets", 1, to=[0]),
    "column of no file": set_at("tensors", "model.cut", "columns", "file", 1, to=4),
    "columns that miss a part": set_at("tensors", "model.cut", "columns", "lengths", 1, to=[2, 1]),
    "objects of bad base64": set_at("objects", "x", to={"$bytes": "***"}),
    "objects of a bad tuple": set_at("objects", "x", to={"$tuple": 5}),
    "objects of a bad dict": set_at("objects", "x", to={"$dict": [[1]]}),
    "objects of an unhashable key": set_at("objects", "x", to={"$dict": [[[], 1]]}),
    "objects of a bad float": set_at("objects", "x", to={"$float": "one"}),
    "objects of a huge float": set_at("objects", "x", to={"$float": 10**400}),
    "objects of a huge complex": set_at("objects", "x", to={"$complex": [10**400, 0]}),
    "objects of a short complex": set_at("objects", "x", to={"$complex": [1]}),
    "objects of a NumPy object": set_at("objects", "x", to={"$numpy": ["|O", "AAAAAAAAAAA="]}),
    "objects of a NumPy structure": set_at("objects", "x", to={"$numpy": ["f8,f8", ""]}),
    "objects of no NumPy bytes": set_at("objects", "x", to={"$numpy": ["<f8", ""]}),
    "objects of a NumPy nothing": set_at("objects", "x", to={"$numpy": None}),
    "objects a set": set_at("objects", to={"$set": [1]}),
    "config a float": set_at("config", to={"$float": "inf"}),
}  # fmt: skip


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE)
def test_from_bytes_rejects_hostile_content(edit):
    top = parsed_golden()
    edit(top)
    text = str(rejection(sealed(top)))
    assert "checksum does not match" not in text  # rejected for its content


def test_from_bytes_checks_version_first():
    top = {"format": "perdure-checkpoint", "version": 2, "everything": "else"}
    assert "reads version 1" in str(rejection(sealed(top)))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), 1 << 64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "F32", "../x", FILE, "model.weight"]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["a", "alias", "file", "grid", "columns", "shape", "dtype", "$dict", "$tuple",
                 "$set", "$float", "$complex", "$numpy", "$bytes", "$Counter", "$OrderedDict"]
            ),
            children,
            max_size=3,
        )
    ),
    max_leaves=6,
)  # fmt: skip


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    items = value.items() if isinstance(value, dict) else ()
    below = [leaf for key, item in items for leaf in paths_in(item, (*path, key))]
    return [path, *below] if path else below


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(paths_in(parsed_golden())), JSON_VALUES)
def test_from_bytes_rejects_or_normalizes_any_edit(path, value):
    top = parsed_golden()
    set_at(*path, to=value)(top)
    try:
        parsed = manifest.from_bytes(sealed(top), "x")
    except CheckpointError:
        return
    files = list(parsed.files)
    assert all(re.fullmatch(r"[0-9a-z.-]+\.safetensors", name) for name in files)
    for name in parsed.tensors:
        entry = parsed.resolve(name)
        for file, box in all_boxes(entry, files):
            ends = [o + n for o, n in zip(box.offsets, box.lengths, strict=True)]
            assert file in files
            assert all(0 <= end <= size for end, size in zip(ends, entry.shape, strict=True))
    assert isinstance(parsed.objects, dict)
    assert isinstance(parsed.config, dict)


# --- division of tensors -------------------------------------------------------------------------


def all_boxes(entry, files):
    return list(entry.boxes(files, Box.full(entry.shape)))


SHAPES_AND_GRIDS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(SHAPES_AND_GRIDS, st.data())
def test_grid_covers_each_element_once_and_boxes_selects_overlapping_cells(pairs, data):
    shape, grid = tuple(n for n, _ in pairs), tuple(g for _, g in pairs)
    entry = TensorEntry(dtype="F32", shape=shape, grid=grid)
    owner = np.full(shape, -1)
    for number in range(math.prod(grid)):
        cell = entry.cell(number)
        index = tuple(slice(o, o + n) for o, n in zip(cell.offsets, cell.lengths, strict=True))
        assert owner[index].shape == cell.lengths
        assert (owner[index] == -1).all()
        owner[index] = number
    assert (owner >= 0).all()
    begin = [data.draw(st.integers(0, n)) for n in shape]
    end = [data.draw(st.integers(b, n)) for b, n in zip(begin, shape, strict=True)]
    owners = owner[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))]
    box = Box(tuple(begin), tuple(e - b for b, e in zip(begin, end, strict=True)))
    cells = list(entry.boxes([str(i) for i in range(math.prod(grid))], box))
    if owners.size:
        assert [int(file) for file, _ in cells] == sorted(set(owners.flatten().tolist()))
    for file, cell in cells:
        assert cell == entry.cell(int(file))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 50), pieces=st.integers(1, 12))
def test_grid_matches_torch_chunk(n, pieces):
    import torch

    entry = TensorEntry(dtype="F32", shape=(n,), grid=(pieces,))
    lengths = [entry.cell(number).lengths[0] for number in range(pieces)]
    chunks = [len(chunk) for chunk in torch.arange(n).chunk(pieces)] if n else []
    assert lengths == chunks + [0] * (pieces - len(chunks))


def test_grid_cells_are_in_c_order():
    cells = all_boxes(TensorEntry(dtype="F32", shape=(3, 4), grid=(2, 2)), ["a", "b", "c", "d"])
    assert [(file, box.offsets, box.lengths) for file, box in cells] == [
        ("a", (0, 0), (2, 2)),
        ("b", (0, 2), (2, 2)),
        ("c", (2, 0), (1, 2)),
        ("d", (2, 2), (1, 2)),
    ]


def test_boxes_of_unsplit_tensor_and_columns():
    files = list(sample().files)
    weight = sample().tensors["model.weight"]
    assert all_boxes(weight, files) == [(files[2], Box((0, 0), (4, 3)))]
    assert all_boxes(sample().resolve("model.cut"), files) == [
        (files[0], Box((0, 0), (2, 1))),
        (files[3], Box((0, 1), (2, 2))),
    ]


def test_resolve_follows_alias():
    assert sample().resolve("model.tied") == sample().tensors["model.weight"]
