"""Rejection of hostile manifests with a correct checksum."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.manifests import parsed_golden, rejection, sealed

from trainer.checkpoint import manifest
from trainer.checkpoint.box import Box
from trainer.errors import CheckpointError


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
    "other version": set_at("version", to=3),
    "version 0": set_at("version", to=0),
    "version true": set_at("version", to=True),
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
            ("tensors", "model.sharded", "grid", 0), ("file_lists", 0, 0),
            ("tensors", "model.cut", "columns", "file", 0),
            ("tensors", "model.cut", "columns", "offsets", 0, 0),
            ("tensors", "model.cut", "columns", "lengths", 0, 0),
        )
        for value in NOT_NATURAL
    },
    "block_bytes 0": set_at("block_bytes", to=0),
    "block_bytes above 1 MiB": set_at("block_bytes", to=(1 << 20) + 1),
    "name that is not Unicode": set_at("tensors", "a\ud800", to={"alias": "model.weight"}),
    "reserved name": set_at("tensors", "__checksums__", to={"alias": "model.weight"}),
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
    "grid with an empty piece": set_at("tensors", "model.sharded", "grid", to=[4, 1]),
    "list of files beyond the last": set_at("tensors", "model.replicated", "file_list", to=1),
    "list of files of another length": set_at("file_lists", 0, to=[3, 1, 2]),
    "list of unknown files": set_at("file_lists", 0, to=[3, 4]),
    "list of files a number": set_at("file_lists", 0, to=3),
    "lists of files a text": set_at("file_lists", to="31"),
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
    top = {"format": "perdure-checkpoint", "version": 3, "everything": "else"}
    assert "reads versions 1 to 2" in str(rejection(sealed(top)))


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
        for file, box in entry.boxes(files, Box.full(entry.shape)):
            ends = [o + n for o, n in zip(box.offsets, box.lengths, strict=True)]
            assert file in files
            assert all(0 <= end <= size for end, size in zip(ends, entry.shape, strict=True))
    assert isinstance(parsed.objects, dict)
    assert isinstance(parsed.config, dict)
