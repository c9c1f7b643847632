"""python -m trainer.checkpoints: golden outputs, rejected arguments and exit codes."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from trainer import checkpoint, checkpoints
from trainer.checkpoint import Content, lineage, manifest
from trainer.checkpoint.dcp import PerdureStorageReader, PerdureStorageWriter
from trainer.cluster.world import World
from trainer.storage import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
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
    """Attempt 1 saved steps 10 to 40 and crashed in 50; attempt 2 resumed from 20 and runs."""
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


def normalized(text: str, run: Path) -> str:
    """Replace values that differ between machines and days."""
    text = text.replace(str(run.parent), "<folder>")
    text = text.replace(torch.__version__, "<torch>")
    text = re.sub(r"-[0-9a-f]{8}-(\d+)\.safetensors", r"-<token>-\1.safetensors", text)
    text = re.sub(r'"saved": "[^"]*"', '"saved": "<time>"', text)
    text = re.sub(r"[\d.]+ [kMG]?B/s", "<rate>", text)
    return re.sub(r"(?<=kB)  +\d+ s(?=  )", "  <age>", text)


# --- golden outputs ------------------------------------------------------------------------------

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
def test_command_output_equals_golden(run, tmp_path, capsys, name, form):
    if "DAMAGED" in GOLDENS[name]:
        damage(run, "step-00000020.0001")
    places = {"RUN": run, "DAMAGED": run, "TARGET": tmp_path / "target"}
    arguments = [places.get(word, word) for word in GOLDENS[name]]
    code, out, err = call(capsys, *arguments, *(["--json"] if form == "json" else []))
    assert (code, err) == (CODES.get(name, 0), "")
    golden = GOLDEN / f"{name}.{'json' if form == 'json' else 'txt'}"
    output = normalized(out, run)
    if os.environ.get("PERDURE_WRITE_GOLDEN"):
        golden.write_text(output)
    assert output == golden.read_text()
    if form == "json":
        json.loads(out)


def test_verify_names_first_damaged_tensor(run, capsys):
    damage(run, "step-00000020.0001")
    code, out, _ = call(capsys, "verify", run, "step=20")
    assert code == 1
    assert "damaged" in out
    assert "tensor 'model.weight'" in out
    assert call(capsys, "verify", run, "step=30")[0] == 0


# --- prune -------------------------------------------------------------------------------------


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if any(path.iterdir()))


def test_prune_keeps_retained_and_unfinished_checkpoints(run, capsys):
    before = tree(run)
    code, out, _ = call(capsys, "prune", run, "--yes")
    assert code == 0
    assert "freed" in out
    # the running attempt resumed from 20
    assert folders(run) == [
        "step-00000020.0001", "step-00000030.0002", "step-00000040.0002", "step-00000050.0001",
    ]  # fmt: skip
    assert tree(run).items() <= before.items()
    assert call(capsys, "verify", run)[0] == 0


def test_prune_deletes_orphaned_files_after_newest_attempt_ended(run, capsys):
    store = LocalStore(run)
    lineage.amend(store, lineage.Attempt(2, ""), {"ended": "2026-01-02"})
    (run / "checkpoints/step-00000030.0002/notes.txt").write_text("user file")
    assert call(capsys, "prune", run, "--yes")[0] == 0
    assert folders(run) == [
        "step-00000030.0002", "step-00000040.0002", "step-00000050.0001"
    ]  # fmt: skip
    for name in ("step-00000040.0002", "step-00000050.0001"):
        (file,) = (run / "checkpoints" / name).iterdir()
        assert manifest.is_void(file.read_bytes())  # the writing process can no longer commit
    assert (run / "checkpoints/step-00000030.0002/notes.txt").exists()


def test_checkpoints_folder_of_a_run_is_opened_as_the_run(run, capsys):
    """The attempt records above `checkpoints/` are applied."""
    content = json.loads(call(capsys, "list", run / "checkpoints", "--json")[1])
    assert (
        content["checkpoints"] == json.loads(call(capsys, "list", run, "--json")[1])["checkpoints"]
    )
    assert call(capsys, "prune", run / "checkpoints", "--yes")[0] == 0
    assert "step-00000030.0002" in folders(run)


def test_prune_with_truncated_newest_shard_keeps_older_checkpoint(run, capsys):
    (shard,) = (run / "checkpoints/step-00000030.0002").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    assert call(capsys, "prune", run, "keep_last=1", "--yes")[0] == 0
    assert "step-00000020.0001" in folders(run)


def test_prune_keeps_user_files_in_checkpoint_folder(tmp_path, capsys):
    for step in (1, 2):
        one_checkpoint(tmp_path / f"all/step-{step}")
    (tmp_path / "all/step-1/tokenizer.json").write_text("{}")
    one_checkpoint(tmp_path / "all/step-1/nested-7")
    assert call(capsys, "prune", tmp_path / "all", "keep_last=1", "--yes")[0] == 0
    files = {str(path.relative_to(tmp_path / "all")) for path in (tmp_path / "all").rglob("*.json")}
    assert files == {
        "step-1/tokenizer.json",
        "step-1/nested-7/manifest.json",
        "step-2/manifest.json",
    }


def one_checkpoint(folder: Path, value: float = 1.0) -> Path:
    dcp.save(
        {"w": torch.full((9,), value)}, storage_writer=PerdureStorageWriter(folder), no_dist=True
    )
    return folder


def test_prune_applies_retention_options(run, capsys):
    arguments = ("keep_last=1", "keep_best=1", "keep_every_steps=10", "--yes")
    assert call(capsys, "prune", run, *arguments)[0] == 0
    assert "step-00000010.0001" in folders(run)


def test_prune_without_terminal_and_yes_deletes_nothing(run, capsys, monkeypatch):
    before = tree(run)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, out, err = call(capsys, "prune", run)
    assert (code, out) == (2, "")
    assert "--yes" in err
    assert tree(run) == before


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_prune_on_terminal_asks(run, answer, code):
    before = tree(run)
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.checkpoints", "prune", str(run)],
        cwd=ROOT, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(leader, f"{answer}\n".encode())
    _, err = process.communicate(timeout=120)
    os.close(leader)
    os.close(follower)
    assert process.returncode == code
    assert "[y/N]" in err
    assert (tree(run) == before) == (code == 2)


# --- copy --------------------------------------------------------------------------------------


def test_copy_run_copies_surviving_checkpoints(run, tmp_path, capsys):
    target = tmp_path / "target"
    assert call(capsys, "copy", run, target)[0] == 0
    copied, source = tree(target), tree(run)
    assert copied.items() <= source.items()
    omitted = {name.split("/")[1] for name in source.keys() - copied.keys()}
    assert omitted == {
        "step-00000030.0001", "step-00000040.0001", "step-00000040.0002", "step-00000050.0001",
    }  # fmt: skip
    assert call(capsys, "verify", target)[0] == 0
    assert call(capsys, "diff", run, target)[0] == 0


def test_copy_has_the_save_durations_of_a_run(run, tmp_path, capsys):
    target = tmp_path / "target"
    (run / "saves.jsonl").write_text('{"step": 10}\n')
    (run / "saves").mkdir()
    (run / "saves/0002-000001.jsonl").write_text('{"step": 30}\n')  # not joined yet
    assert call(capsys, "copy", run, target)[0] == 0
    copied, source = tree(target), tree(run)
    for name in ("saves.jsonl", "saves/0002-000001.jsonl"):
        assert copied[name] == source[name]


def test_copy_continues_after_interruption(run, tmp_path, capsys):
    target = tmp_path / "target"
    call(capsys, "copy", run, target)
    for name in ("step-00000020.0001", "step-00000030.0002"):
        (target / "checkpoints" / name / "manifest.json").unlink()
    shard = next((target / "checkpoints/step-00000030.0002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:5000])
    code, out, _ = call(capsys, "copy", run, target)
    assert (code, "2 checkpoints copied, 1 already there and intact" in out) == (0, True)
    assert call(capsys, "verify", target)[0] == 0


def test_copy_replaces_damaged_target_only_with_yes(run, tmp_path, capsys, monkeypatch):
    target = tmp_path / "target"
    call(capsys, "copy", run, target)
    damage(target, "step-00000020.0001")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = tree(target)
    code, _, err = call(capsys, "copy", run, target)
    assert (code, "damaged" in err, tree(target) == before) == (2, True, True)
    assert call(capsys, "copy", run, target, "--yes")[0] == 0
    assert call(capsys, "verify", target)[0] == 0


def test_copy_into_another_run_is_rejected(run, tmp_path, capsys):
    other = LocalStore(tmp_path / "other")
    lineage.begin(other, {})
    code, _, err = call(capsys, "copy", run, tmp_path / "other")
    assert code == 2
    assert "belongs to another run" in err
    assert list((tmp_path / "other").iterdir()) == [tmp_path / "other/attempts"]


def test_copy_of_damaged_source_commits_nothing(run, tmp_path, capsys):
    damage(run, "step-00000020.0001")
    code, _, err = call(capsys, "copy", run, tmp_path / "target", "step=20")
    assert (code, "model.weight" in err) == (1, True)
    assert not (tmp_path / "target/checkpoints/step-00000020.0001/manifest.json").exists()


def test_copy_of_one_checkpoint_creates_one_checkpoint(run, tmp_path, capsys):
    one = run / "checkpoints/step-00000020.0001"
    assert call(capsys, "copy", one, tmp_path / "best")[0] == 0
    assert tree(tmp_path / "best") == tree(one)
    assert call(capsys, "diff", run, tmp_path / "best", "step=20")[0] == 0


def test_copy_rejects_overlapping_paths_and_folders_of_checkpoints(run, tmp_path, capsys):
    parent = one_checkpoint(tmp_path / "home/step-1").parent
    before = tree(tmp_path)
    one = run / "checkpoints/step-00000020.0001"
    for target, code, text in (
        (parent, 1, "contains step-1/"),
        (run, 2, "overlap"),
        (one / "subfolder", 2, "overlap"),
        (tmp_path, 2, "overlap"),
    ):
        exit_code, _, err = call(capsys, "copy", one, target, "--yes")
        assert (exit_code, text in err) == (code, True), err
    assert call(capsys, "copy", run, run, "--yes")[0] == 2
    assert tree(tmp_path) == before


def test_copy_into_folder_with_user_files_is_rejected(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text("precious")
    code, _, err = call(capsys, "copy", run, tmp_path / "mine", "--yes")
    assert (code, "contains config.yaml" in err) == (2, True)
    assert tree(tmp_path / "mine") == {"config.yaml": b"precious"}


def test_copy_of_damaged_source_deletes_nothing(tmp_path, capsys):
    source, target = one_checkpoint(tmp_path / "a"), one_checkpoint(tmp_path / "b", 2.0)
    (shard,) = source.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    before = tree(target)
    assert call(capsys, "copy", source, target, "--yes")[0] == 1
    assert tree(target) == before


def test_copy_of_folder_copies_checkpoints_with_any_name(tmp_path, capsys):
    for name in ("ckpt", "zz-5"):
        one_checkpoint(tmp_path / "ckpt" / name)
    out = json.loads(call(capsys, "copy", tmp_path / "ckpt", tmp_path / "to", "--json")[1])
    assert sorted(out["copied"]) == [0, 5]


# --- rejected input ----------------------------------------------------------------------------


def altered(run: Path, change) -> Path:
    path = run / "checkpoints/step-00000030.0002/manifest.json"
    path.write_bytes(change(path.read_bytes()))
    return path.parent


def newer(data: bytes) -> bytes:
    return data.replace(b'"version":2', b'"version":3')


BAD = {
    "missing": (lambda run, tmp: tmp / "absent", 2, "does not exist"),
    "empty": (lambda run, tmp: make(tmp / "empty"), 2, "is an empty folder"),
    "not a run": (lambda run, tmp: ROOT / "docs", 2, "has no checkpoint (entries: "),
    "a file": (lambda run, tmp: ROOT / "README.md", 2, "is not a checkpoint"),
    "DCP": (lambda run, tmp: stock(tmp / "dcp"), 2, "is a DCP folder"),
    "torch.save": (lambda run, tmp: saved(tmp / "x.pt"), 2, "is a torch.save file"),
    "newer": (lambda run, tmp: altered(run, newer), 1, "format version 3 is not supported"),
    "cut": (lambda run, tmp: altered(run, lambda data: data[:-9]), 1, "altered or truncated"),
    "void": (lambda run, tmp: altered(run, lambda data: b'{"void":3}'), 1, "marked this folder"),
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


@pytest.mark.parametrize("verb", ["show", "verify", "diff", "prune", "copy"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_reports_one_line_and_changes_nothing(run, tmp_path, capsys, kind, verb):
    create, code, text = BAD[kind]
    path = create(run, tmp_path)
    if verb == "copy" and kind in ("DCP", "torch.save"):
        return  # converted
    before = tree(tmp_path)
    more = {"diff": [path], "copy": [tmp_path / "target"], "prune": ["--yes"]}.get(verb, [])
    exit_code, out, err = call(capsys, verb, path, *more)
    if verb == "verify" and code == 1:
        assert (exit_code, text in out) == (1, True)  # reports the result of each checkpoint
    else:
        assert (exit_code, out) == (code, "")
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
        (
            ["show", "a", "store.endpoint=x"],
            "store.endpoint  no such key (did you mean 'endpoint_url'?)",
        ),
        (["show", "a", "step=${x}"], "step  "),
        (["prune", "a", "keep_last=few"], "keep_last  'few' does not fit"),
        (["diff", "a"], "pass two paths, or one path and step=A,B"),
    ],
)
def test_invalid_arguments_report_usage(capsys, arguments, text):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def rewritten(folder: Path, change) -> None:
    """Change a manifest's content and update its checksum."""
    path = folder / "manifest.json"
    original = manifest.from_bytes(path.read_bytes(), "")
    path.write_bytes(manifest.to_bytes(replace(original, **change(original))))


@pytest.mark.parametrize("change", [
    {"config": {"checkpoint": "x"}}, {"objects": {"run": [1]}},
    {"objects": {"run": {"last_eval_step": 20}}},
    {"objects": {"run": {"last_eval_step": 20, "metrics": {"loss": "x"}}}},
    {"config": {"checkpoint": {"metric": {}, "mode": 3, "keep_last": "x"}}},
    {"objects": {"dcp": []}}, {"objects": {"dcp": {"objects": 1, "opaque": {}, "paths": {}}}},
    {"objects": {"a": {(1, 2): float("nan")}, "b": "\udc80"}},
])  # fmt: skip
def test_odd_manifest_values_never_raise(run, capsys, change):
    folder = run / "checkpoints/step-00000020.0001"
    rewritten(folder, lambda original: change)
    for verb in ("list", "show", "verify", "diff", "prune"):
        for form in ([], ["--json"]):
            more = {"diff": ["step=20,30"], "show": ["step=20"], "prune": ["keep_last=9", "--yes"]}
            code, out, err = call(capsys, verb, run, *more.get(verb, []), *form)
            assert code in (0, 1)
            assert err == ""
            if form:
                json.loads(out, parse_constant=pytest.fail)
    if "dcp" in change.get("objects", {}):
        with pytest.raises(CheckpointException, match="malformed"):
            dcp.load({"x": torch.ones(1)}, storage_reader=PerdureStorageReader(folder))


def test_verify_reports_shard_without_a_tensor_of_the_manifest(run, capsys):
    folder = run / "checkpoints/step-00000020.0001"
    ghost = manifest.TensorEntry("F32", (2,), file=0)
    rewritten(folder, lambda original: {"tensors": {**original.tensors, "ghost": ghost}})
    code, out, _ = call(capsys, "verify", run)
    assert (code, "bytes, but its manifest records 10,640" in out) == (1, True)


@pytest.mark.parametrize("record", ['{"attempt": "2"}', '{"attempt": 2, "resumed_from": 5}', "[]"])
def test_invalid_attempt_record_is_reported_and_nothing_deleted(run, capsys, record):
    (run / "attempts/0002.json").write_text(record)
    for verb in ("list", "prune"):
        code, _, err = call(capsys, verb, run, *(["--yes"] if verb == "prune" else []))
        assert (code, "is not a valid attempt record" in err) == (75, True)


@pytest.mark.parametrize("arguments", [
    ["copy", "RUN/checkpoints/step-00000020.0001", "/"],
    ["copy", "RUN/checkpoints/step-00000020.0001", "memory://x/a/.."],
    ["list", "RUN", "store.endpoint_url=["], ["list", "RUN", "store.[=1"],
    ["prune", "RUN", "keep_last=" + "9" * 5000], ["list", "s3://"],
])  # fmt: skip
def test_odd_arguments_are_rejected(run, capsys, arguments):
    before = tree(run)
    code, out, err = call(capsys, *(word.replace("RUN", str(run)) for word in arguments))
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert tree(run) == before


def test_show_escapes_control_characters(tmp_path, capsys):
    state = {"\x1b[31mred\n": torch.ones(2)}
    dcp.save(state, storage_writer=PerdureStorageWriter(tmp_path / "a"), no_dist=True)
    out = call(capsys, "show", tmp_path / "a")[1]
    assert "\x1b" not in out
    assert "\\x1b[31mred\\n" in out


def test_show_missing_step_lists_steps(run, capsys):
    code, _, err = call(capsys, "show", run, "step=11")
    assert (code, "available: 10, 20, 30" in err) == (2, True)
    code, _, err = call(capsys, "show", run, "step=best")
    assert code == 0


def test_help_exit_codes(capsys):
    assert call(capsys, "--help")[0] == 0
    assert call(capsys)[0] == 2
