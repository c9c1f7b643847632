"""The documents agree with the code."""

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.saved_tensors import raw_bytes
from support.state_dicts import net

from scripts.settings_reference import reference
from trainer import checkpoint
from trainer.checkpoint import Content, Writer, dtypes, lineage, save, state_tree
from trainer.checkpoint.location import open_location
from trainer.checkpoint.manifest import to_bytes
from trainer.checkpoint.select import pick
from trainer.cluster.world import World
from trainer.storage import open_store

ROOT = Path(__file__).resolve().parents[2]
READER = ROOT / "docs/examples/read_checkpoint.py"


def test_settings_page_matches_the_code():
    assert (ROOT / "docs/settings.md").read_text() == reference(), (
        "run python scripts/settings_reference.py > docs/settings.md"
    )


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))],
    ids=lambda p: p.name,
)
def test_lines_have_at_most_100_columns(path):
    """Except code, and the pictures of the README."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("| ![")]
    assert [line for line in lines if len(line) > 100] == []


def test_every_page_is_in_the_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in contents] == []


@pytest.fixture(scope="module")
def reader():
    """The standalone reader's names."""
    names = {"__name__": "read_checkpoint"}
    exec(compile(READER.read_text(), READER.name, "exec"), names)
    return names


@pytest.fixture
def run(tmp_path):
    """A run with tensors of every kind, of two attempts, the older of which has left a step."""
    store = open_store(str(tmp_path / "run"))
    for step, resumed_from in ((3, None), (8, None), (5, 3)):
        if step != 8:
            attempt = lineage.begin(store, {})
            origin = {"step": resumed_from or 0, "attempt": None if resumed_from is None else 1}
            lineage.amend(store, attempt, {"resumed_from": origin})
            writer = Writer(store, World(), attempt)
        content = Content()
        state_tree.add_model(content, net(step), with_buffers=True)
        content.rank_local["wide"] = torch.randn(3, 2, dtype=torch.complex128)
        content.rank_local["long"] = torch.randn(1 << 19)  # two blocks
        save(writer, content, step=step, config={})
    return tmp_path / "run"


def fetched(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, read by Perdure."""
    location = open_location(str(folder))
    reader = location.reader(commit := pick(location, "latest"))
    return {name: reader.fetch(name) for name in location.manifest(commit).tensors}


def test_standalone_reader_matches_perdures_reader(reader, run):
    folder = reader["newest"](run)
    assert folder.name == "step-00000005.0002"  # step 8 was left
    _, arrays = reader["read"](folder)
    tensors = fetched(run)
    assert set(arrays) == set(tensors)
    for name, tensor in tensors.items():
        assert arrays[name].shape == tensor.shape
        assert arrays[name].tobytes() == raw_bytes(tensor)


@pytest.mark.parametrize("name", ["ranks-1", "ranks-2", "shipped"])
def test_standalone_reader_reads_version_1(reader, name):
    folder = reader["newest"](ROOT / "tests/golden/flat_layout_run" / name / "run")
    manifest, arrays = reader["read"](folder)
    assert manifest["version"] == 1
    tensors = fetched(folder)
    assert {n: array.tobytes() for n, array in arrays.items()} == {
        n: raw_bytes(tensor) for n, tensor in tensors.items()
    }


@pytest.mark.parametrize("version", [1, 2])
def test_standalone_reader_detects_damage(reader, run, tmp_path, version):
    if version == 1:
        run = tmp_path / "v1"
        shutil.copytree(ROOT / "tests/golden/flat_layout_run/ranks-2/run", run)
    folder = reader["newest"](run)
    for path in [folder / "manifest.json", *folder.glob("*.safetensors")]:
        data = path.read_bytes()
        for position in [*range(0, len(data), len(data) // 20 + 1), len(data) - 1]:
            damaged = bytearray(data)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(SystemExit, match="is damaged"):
                reader["read"](folder)
        path.write_bytes(data[:-1])
        with pytest.raises(SystemExit, match="is damaged"):
            reader["read"](folder)
        path.write_bytes(data)
    reader["read"](folder)


def test_standalone_reader_is_short_and_independent(run):
    source = ast.parse(READER.read_text())
    imported = [node for node in ast.walk(source) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert names == {"json", "re", "sys", "pathlib", "numpy", "xxhash"}
    words = {ast.get_docstring(node, clean=False) for node in ast.walk(source)
             if isinstance(node, (ast.Module, ast.FunctionDef))}  # fmt: skip
    lines = READER.read_text()
    for text in words - {None}:
        lines = lines.replace(f'"""{text}"""', "")
    assert len([line for line in lines.splitlines() if line.strip()]) <= 80
    done = subprocess.run(
        [sys.executable, "-I", READER, run], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("step 5, ")
    assert checkpoint.latest(open_store(str(run))).step == 5


# --- the format ----------------------------------------------------------------------------------


def format_page() -> str:
    return (ROOT / "docs/checkpoint-format.md").read_text()


def listed_names(cell: str) -> list[str]:
    """Return the names in a cell such as "`A`, `B1` … `B7`"."""
    cell = re.sub(
        r"`(\D+)1` … `\D+7`", lambda m: " ".join(f"`{m[1]}{bits}`" for bits in range(1, 8)), cell
    )
    return re.findall(r"`(.*?)`", cell)


def test_format_page_lists_every_dtype():
    table = format_page().partition("### Dtypes")[2].partition("A complex number")[0]
    rows = {}
    for line in table.splitlines()[4:-1]:
        names, size, torch_names, stored = line.strip("| ").split(" | ")
        shape = (5, 2) if "last axis of 2" in stored else (5,)
        for name, torch_name in zip(listed_names(names), listed_names(torch_names), strict=True):
            header = name if stored == "same" else listed_names(stored)[0]
            rows[name] = (int(size), torch_name, (header, shape))
    assert rows == {
        name: (size, dtypes.TORCH_NAMES[name], dtypes.stored_as(name, (5,)))
        for name, size in dtypes.DTYPES.items()
    }


def test_format_page_example_has_the_bytes_that_are_written(tmp_path):
    example = format_page().partition("## Example")[2]
    text, dump, header = re.findall(r"```\w+\n(.*?)```", example, re.DOTALL)[:3]
    store = open_store(str(tmp_path))
    content = Content(
        {"model.w": torch.tensor([1.5, -2]), "model.n": torch.tensor([1, 2, 3], dtype=torch.int8)},
        objects={"run": {"step": 4}},
    )
    saved = save(Writer(store, World(), lineage.Attempt(1, "9f2c41aa")), content, step=4, samples=8)
    saved = replace(saved, versions=json.loads(text)["versions"])
    assert to_bytes(saved) == text.encode()
    (shard,) = tmp_path.rglob("*.safetensors")
    data = shard.read_bytes()
    assert f"{len(data):,} bytes" in example
    assert data[8:4096].rstrip(b" ") == header.strip().encode()
    rows = [line for line in dump.splitlines() if line != "…"]
    positions = [int(row[:4], 16) for row in rows]
    assert positions == [0, 16, *range(4080, len(data), 16)]
    for position, row in zip(positions, rows, strict=True):
        assert bytes.fromhex(row[4:54]) == data[position : position + 16]
