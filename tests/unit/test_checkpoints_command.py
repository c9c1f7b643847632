"""python -m trainer.checkpoints over a run that has everything: golden outputs, refusals, exits."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from trainer import checkpoint, checkpoints
from trainer.checkpoint import Content, lineage, manifest
from trainer.distributed import World
from trainer.storage import LocalStore

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/checkpoints"


def content(step: int) -> Content:
    torch.manual_seed(0)
    weights = torch.arange(600.0).reshape(20, 30)
    weights[3, 4] += step  # one element moves
    noise = torch.full((1000,), float(step))
    return Content(
        tensors={"model.weight": weights, "model.bias": torch.ones(30), "optimizer.w.step": noise},
        aliases={"model.tied": "model.weight"},
        objects={
            "run": {
                "last_eval_step": step,
                "metrics": {"loss": 9.0 / step, "accuracy": step / 100},
            },
            "optimizer": {"groups": [{"lr": 0.1 if step < 30 else 0.01, "betas": (0.9, 0.99)}]},
        },
    )


CONFIG = {"checkpoint": {"metric": "accuracy", "mode": "max", "keep_last": 1, "keep_best": 1}}


@pytest.fixture
def run(tmp_path):
    """Attempt 1 saved 10, 20, 30, 40 and died in 50; attempt 2 went on from 20, saves 30, lives."""
    folder = tmp_path / "run"
    store = LocalStore(folder)
    first = lineage.begin(store, {"host": "a"})
    writer = checkpoint.Writer(store, World(), first)
    for step in (10, 20, 30, 40):
        checkpoint.save(writer, content(step), step=step, epoch=1, samples=step * 8, config=CONFIG)
    lineage.amend(store, first, {"ended": "2026-01-01", "outcome": "failed"})
    shard = next((folder / "checkpoints/step-00000040.0001").glob("*.safetensors"))
    (folder / "checkpoints/step-00000050.0001").mkdir()
    shutil.copy(shard, folder / "checkpoints/step-00000050.0001" / shard.name)
    second = lineage.begin(store, {"host": "b", "resumed_from": {"step": 20, "attempt": 1}})
    writer = checkpoint.Writer(store, World(), second)
    checkpoint.save(writer, content(30), step=30, epoch=2, samples=240, config=CONFIG)
    (folder / "checkpoints/step-00000040.0002").mkdir()
    shutil.copy(shard, folder / "checkpoints/step-00000040.0002" / shard.name)
    (folder / "config.yaml").write_text("name: run\n")
    return folder


def damage(run: Path, step: str) -> None:
    """Flip a bit of model.weight."""
    (file,) = (run / "checkpoints" / step).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5000] ^= 1
    file.write_bytes(data)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    code = checkpoints.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def settled(text: str, run: Path) -> str:
    """Without what differs from machine to machine and from day to day."""
    text = text.replace(str(run.parent), "<folder>")
    text = text.replace(torch.__version__, "<torch>")
    text = re.sub(r"-[0-9a-f]{8}-(\d+)\.safetensors", r"-<token>-\1.safetensors", text)
    text = re.sub(r'"saved": "[^"]*"', '"saved": "<time>"', text)
    text = re.sub(r"[\d.]+ [kMG]?B/s", "<rate>", text)
    return re.sub(r"(?<=kB)  +\d+ s(?=  )", "  <age>", text)


# --- what it says ------------------------------------------------------------------------------

GOLDENS = {
    "list": ("list", "RUN"),
    "show": ("show", "RUN", "step=20"),
    "verify": ("verify", "RUN"),
    "verify-damaged": ("verify", "DAMAGED"),
    "diff": ("diff", "RUN", "step=20,30"),
    "diff-equal": ("diff", "RUN", "RUN"),
    "prune": ("prune", "RUN", "--yes"),
    "copy": ("copy", "RUN", "TARGET"),
}
CODES = {"verify-damaged": 1, "diff": 1}


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("name", GOLDENS)
def test_what_a_command_says_is_the_golden_text(run, tmp_path, capsys, name, form):
    if "DAMAGED" in GOLDENS[name]:
        damage(run, "step-00000020.0001")
    places = {"RUN": run, "DAMAGED": run, "TARGET": tmp_path / "target"}
    arguments = [places.get(word, word) for word in GOLDENS[name]]
    code, out, err = call(capsys, *arguments, *(["--json"] if form == "json" else []))
    assert (code, err) == (CODES.get(name, 0), "")
    golden = GOLDEN / f"{name}.{'json' if form == 'json' else 'txt'}"
    found = settled(out, run)
    if os.environ.get("PERDURE_WRITE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()
    if form == "json":
        json.loads(out)


def test_the_first_damaged_tensor_is_named(run, capsys):
    damage(run, "step-00000020.0001")
    code, out, _ = call(capsys, "verify", run, "step=20")
    assert code == 1
    assert "DAMAGED" in out
    assert "tensor 'model.weight'" in out
    assert call(capsys, "verify", run, "step=30")[0] == 0


# --- prune -------------------------------------------------------------------------------------


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if any(path.iterdir()))


def test_prune_deletes_litter_and_what_the_configuration_does_not_keep(run, capsys):
    before = tree(run)
    code, out, _ = call(capsys, "prune", run, "--yes")
    assert code == 0
    assert "freed" in out
    # 20 is what the living attempt went on from; its own 40 is being written
    assert folders(run) == [
        "step-00000020.0001", "step-00000030.0002", "step-00000040.0002", "step-00000050.0001",
    ]  # fmt: skip
    assert manifest.is_void((run / "checkpoints/step-00000050.0001/manifest.json").read_bytes())
    after = tree(run)
    assert all(before[name] == data for name, data in after.items() if "0050" not in name)
    assert call(capsys, "verify", run)[0] == 0


def test_prune_keeps_what_it_is_told_to_keep(run, capsys):
    arguments = ("keep_last=1", "keep_best=1", "keep_every_steps=10", "--yes")
    assert call(capsys, "prune", run, *arguments)[0] == 0
    assert "step-00000010.0001" in folders(run)


def test_without_a_terminal_and_without_yes_nothing_is_deleted(run, capsys, monkeypatch):
    before = tree(run)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, out, err = call(capsys, "prune", run)
    assert (code, out) == (2, "")
    assert "--yes" in err
    assert tree(run) == before


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_it_asks(run, answer, code):
    before = tree(run)
    leader, follower = pty.openpty()
    asked = subprocess.Popen(
        [sys.executable, "-m", "trainer.checkpoints", "prune", str(run)],
        cwd=ROOT, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(leader, f"{answer}\n".encode())
    _, err = asked.communicate(timeout=120)
    os.close(leader)
    os.close(follower)
    assert asked.returncode == code
    assert "[y/N]" in err
    assert (tree(run) == before) == (code == 2)


# --- copy --------------------------------------------------------------------------------------


def test_a_copied_run_is_a_run_with_the_same_checkpoints(run, tmp_path, capsys):
    target = tmp_path / "target"
    assert call(capsys, "copy", run, target)[0] == 0
    there, here = tree(target), tree(run)
    assert there.items() <= here.items()
    left = {name.split("/")[1] for name in here.keys() - there.keys()}
    assert left == {
        "step-00000030.0001", "step-00000040.0001", "step-00000040.0002", "step-00000050.0001",
    }  # fmt: skip
    assert call(capsys, "verify", target)[0] == 0
    assert call(capsys, "diff", run, target)[0] == 0


def test_an_interrupted_copy_goes_on(run, tmp_path, capsys):
    target = tmp_path / "target"
    call(capsys, "copy", run, target)
    for name in ("step-00000020.0001", "step-00000030.0002"):
        (target / "checkpoints" / name / "manifest.json").unlink()
    shard = next((target / "checkpoints/step-00000030.0002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:5000])
    code, out, _ = call(capsys, "copy", run, target)
    assert (code, "2 checkpoints copied, 1 were there, whole" in out) == (0, True)
    assert call(capsys, "verify", target)[0] == 0


def test_a_damaged_copy_is_replaced_only_if_one_may(run, tmp_path, capsys, monkeypatch):
    target = tmp_path / "target"
    call(capsys, "copy", run, target)
    damage(target, "step-00000020.0001")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = tree(target)
    code, _, err = call(capsys, "copy", run, target)
    assert (code, "damaged" in err, tree(target) == before) == (2, True, True)
    assert call(capsys, "copy", run, target, "--yes")[0] == 0
    assert call(capsys, "verify", target)[0] == 0


def test_another_run_is_not_copied_into(run, tmp_path, capsys):
    other = LocalStore(tmp_path / "other")
    lineage.begin(other, {})
    code, _, err = call(capsys, "copy", run, tmp_path / "other")
    assert code == 2
    assert "is another run" in err
    assert list((tmp_path / "other").iterdir()) == [tmp_path / "other/attempts"]


def test_a_damaged_source_is_not_committed(run, tmp_path, capsys):
    damage(run, "step-00000020.0001")
    code, _, err = call(capsys, "copy", run, tmp_path / "target", "step=20")
    assert (code, "model.weight" in err) == (1, True)
    assert not (tmp_path / "target/checkpoints/step-00000020.0001/manifest.json").exists()


def test_one_checkpoint_alone_is_copied_to_a_folder_and_is_one_there(run, tmp_path, capsys):
    one = run / "checkpoints/step-00000020.0001"
    assert call(capsys, "copy", one, tmp_path / "best")[0] == 0
    assert tree(tmp_path / "best") == tree(one)
    assert call(capsys, "diff", run, tmp_path / "best", "step=20")[0] == 0


# --- refusals ----------------------------------------------------------------------------------


def altered(run: Path, change) -> Path:
    path = run / "checkpoints/step-00000030.0002/manifest.json"
    path.write_bytes(change(path.read_bytes()))
    return path.parent


def newer(data: bytes) -> bytes:
    return data.replace(b'"version":1', b'"version":2')


BAD = {
    "missing": (lambda run, tmp: tmp / "absent", 2, "does not exist"),
    "empty": (lambda run, tmp: make(tmp / "empty"), 2, "is an empty folder"),
    "not a run": (lambda run, tmp: ROOT / "docs", 2, "holds no checkpoint (there is"),
    "a file": (lambda run, tmp: ROOT / "README.md", 2, "is no checkpoint"),
    "DCP": (lambda run, tmp: stock(tmp / "dcp"), 2, "this is a DCP folder"),
    "torch.save": (lambda run, tmp: saved(tmp / "x.pt"), 2, "this is a torch.save file"),
    "newer": (lambda run, tmp: altered(run, newer), 1, "format version 2; this program reads"),
    "cut": (lambda run, tmp: altered(run, lambda data: data[:-9]), 1, "altered or cut short"),
    "void": (lambda run, tmp: altered(run, lambda data: b'{"void":3}'), 1, "was given up"),
}


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def stock(folder: Path) -> Path:
    dcp.save({"x": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    return folder


def saved(path: Path) -> Path:
    torch.save({"x": torch.ones(3)}, path)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("verb", ["show", "verify", "diff", "prune", "copy"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_in_one_line_and_nothing_is_changed(run, tmp_path, capsys, kind, verb):
    make_it, code, text = BAD[kind]
    place = make_it(run, tmp_path)
    if verb == "copy" and kind in ("DCP", "torch.save"):
        return  # which it brings
    before = tree(tmp_path)
    more = {"diff": [place], "copy": [tmp_path / "target"], "prune": ["--yes"]}.get(verb, [])
    found, out, err = call(capsys, verb, place, *more)
    if verb == "verify" and code == 1:
        assert (found, text in out) == (1, True)  # it goes through all, and says of each
    else:
        assert (found, out) == (code, "")
        assert text in err
        assert err.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lsit", "x"], "did you mean 'list'"),
        (["list"], "1 path needed, 0 given"),
        (["list", "a", "b"], "1 path needed, 2 given"),
        (["list", "a", "--yess"], "no flag '--yess'"),
        (["prune", "a", "keeplast=2"], "did you mean 'keep_last'"),
        (["show", "a", "store.endpoint=x"], "store.endpoint=x"),
        (["diff", "a"], "give two paths, or one path and step=A,B"),
    ],
)
def test_what_was_typed_wrong_is_said_with_the_usage(capsys, arguments, text):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_steps_that_are_not_there_are_listed(run, capsys):
    code, _, err = call(capsys, "show", run, "step=11")
    assert (code, "the steps 10, 20, 30" in err) == (2, True)
    code, _, err = call(capsys, "show", run, "step=best")
    assert code == 0


def test_help_says_how(capsys):
    assert call(capsys, "--help")[0] == 0
    assert call(capsys)[0] == 2
