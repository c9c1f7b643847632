"""The documents agree with the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.state_dicts import net

from scripts.settings_reference import reference
from trainer import checkpoint
from trainer.checkpoint import Content, Writer, lineage, save, state_tree
from trainer.checkpoint.location import open_location
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


def test_standalone_reader_matches_perdures_reader(reader, run):
    folder = reader["newest"](run)
    assert folder.name == "step-00000005.0002"  # step 8 was left
    manifest, tensors = reader["read"](folder)
    location = open_location(str(run))
    reference_reader = location.reader(pick(location, "latest"))
    assert set(tensors) == set(manifest["tensors"])
    for name, tensor in tensors.items():
        expected = reference_reader.fetch(manifest["tensors"][name].get("alias", name))
        if expected.dtype == torch.bfloat16:
            expected = expected.view(torch.uint16)
        if expected.is_complex():
            expected = torch.view_as_real(expected)
        np.testing.assert_array_equal(tensor, expected.numpy())


def test_standalone_reader_detects_damage(reader, run):
    folder = reader["newest"](run)
    (shard,) = folder.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SystemExit, match="is damaged"):
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
    assert len([line for line in lines.splitlines() if line.strip()]) <= 60
    done = subprocess.run(
        [sys.executable, "-I", READER, run], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("step 5, ")
    assert checkpoint.latest(open_store(str(run))).step == 5
