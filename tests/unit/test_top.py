"""python -m trainer.top: runs are found, read cheaply, ordered; a table, JSON, a way out."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support.run_records import first, lines, moment, second, write

from trainer import checkpoint, top
from trainer.checkpoint import Content, lineage
from trainer.cluster.world import World
from trainer.config.schema import ObjectStore
from trainer.errors import StoreError
from trainer.reporting import overview
from trainer.reporting.facts import Best
from trainer.storage import LocalStore
from trainer.tracking import jsonl

ROOT = Path(__file__).resolve().parents[2]
HERE = ObjectStore()


def living(**more):
    """The record of an attempt that began lately and has not ended."""
    previous = {"host": "n1", "first_step": 0, "max_steps": 200, "steps_per_epoch": 10}
    return {"started": moment(20), "told": moment(1), **previous, **more}


@pytest.fixture
def runs(tmp_path):
    """A finished, a running and a killed run, among entries that are not runs."""
    folder = tmp_path / "runs"
    write(folder / "done", lines(), records=[first(), second()])
    write(folder / "lab/alive", lines(began_s=42), records=[living()])
    write(
        folder / "killed",
        lines(),
        records=[living(started=moment(900), **{"told": moment(800)})],
    )
    (folder / "exports").mkdir()
    (folder / "notes.txt").touch()
    return folder


def rendered(capsys, *arguments):
    code = top.main(list(map(str, arguments)))
    rows = capsys.readouterr()
    return code, rows.out, rows.err


def test_find_searches_folders_two_levels_deep(runs):
    expected = ["done", "killed", "lab/alive"]
    assert overview.find(str(runs), HERE) == [f"{runs}/{name}" for name in expected]
    assert overview.find(f"{runs}/done/", HERE) == [f"{runs}/done"]


def test_json_has_the_state_of_each_run(runs, capsys):
    code, out, _ = rendered(capsys, runs, "--once", "--json")
    assert code == 0
    alive, killed, done = json.loads(out)["runs"]
    assert [one["state"] for one in (alive, killed, done)] == ["running", "silent", "finished"]
    assert alive["step"] == 40
    assert alive["max_steps"] == 200
    assert alive["eta_s"] == pytest.approx(160, rel=1e-6)  # a step a second
    assert alive["loss"] == 3.0 / 40
    assert (alive["metric"], alive["value"], alive["eval_step"]) == ("accuracy", 0.8, 40)
    assert (alive["checkpoint_step"], alive["attempts"]) == (None, 1)
    assert done["attempts"] == 2
    assert done["max_steps"] == 40
    assert done["eta_s"] is killed["eta_s"] is None
    assert done["since_s"] == pytest.approx(time.time() - 570, abs=30)


def test_once_prints_the_table(runs, capsys):
    code, out, _ = rendered(capsys, runs, "--once")
    assert code == 0
    head, alive, killed, done, *reasons = out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert alive.split()[1:5] == ["running", "40/200", "20", "%"]
    assert "2 min 40 s" in alive
    assert re.search("silent 1[34] min ago", killed)
    assert "finished" in done
    assert "accuracy 0.8" in done
    assert reasons
    assert all(str(runs) in reason for reason in reasons)
    assert "█" in done


def test_sweep_run_is_found_by_name_with_its_reason(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a-lr=0.1", lines(), records=[first()])
    (tmp_path / "a-lr=0.1/attempts/0002.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert top.main(["a-lr=0.1", "--once"]) == 0
    _, row, reason = capsys.readouterr().out.splitlines()
    assert "unreadable" in row
    assert reason.startswith("a-lr=0.1: ")
    assert "0002.json" in reason


def test_run_names_are_printed_without_control_characters(tmp_path, capsys):
    write(tmp_path / "a\x1b[2Jb", lines(), records=[first()])
    _, out, _ = rendered(capsys, tmp_path)
    assert "\x1b" not in out
    assert "a\\x1b[2Jb" in out


def test_damaged_files_do_not_hide_the_other_runs(runs, capsys):
    (runs / "done/attempts/0002.json").write_text("{")
    (runs / "killed/config.yaml").write_text("a: [")
    with open(runs / "lab/alive/metrics.jsonl", "ab") as file:
        file.write(b"\xff\xff\n[]\n{")
    code, out, _ = rendered(capsys, runs, "--json")
    assert code == 0
    rows = {Path(one["run"]).name: one for one in json.loads(out)["runs"]}
    assert rows["done"]["state"] == "unreadable"
    assert "0002.json" in rows["done"]["why"]
    assert rows["killed"]["state"] == "silent"
    assert rows["alive"]["step"] == 40


def test_newest_checkpoint_is_of_the_current_timeline(tmp_path):
    store = LocalStore(tmp_path)

    def save(attempt, *steps):
        writer = checkpoint.Writer(store, World(), attempt)
        for step in steps:
            content = Content(tensors={"w": torch.ones(3)}, objects={"run": {}})
            checkpoint.save(writer, content, step=step, epoch=0, samples=step)

    first = lineage.begin(store, {"host": "a"})
    save(first, 10, 20, 30)
    assert overview.read_row(str(tmp_path), HERE).checkpoint_step == 30
    second = lineage.begin(store, {"host": "b"})
    lineage.amend(store, second, {"resumed_from": {"step": 10, "attempt": 1}, "first_step": 10})
    assert overview.read_row(str(tmp_path), HERE).checkpoint_step == 10
    save(second, 15)
    (tmp_path / "checkpoints/step-00000018.0002").mkdir()
    row = overview.read_row(str(tmp_path), HERE)
    assert row.checkpoint_step == 15
    assert row.checkpoint_s == pytest.approx(time.time(), abs=60)


def test_finished_run_is_not_read_again_until_it_resumes(runs, monkeypatch):
    url = f"{runs}/done"
    before = overview.read_row(url, HERE)
    with monkeypatch.context() as patched:
        patched.setattr(jsonl, "newest", lambda store: pytest.fail("it was read"))
        assert overview.read_row(url, HERE, before) is before
    write(runs / "done", lines(), records=[first(), second(), living()])
    assert overview.read_row(url, HERE, before).state == "running"


def test_long_metrics_file_is_read_from_its_end(tmp_path):
    written = [{**line, "pad": "x" * 500} for line in lines(last=3000, per_epoch=100)]
    write(tmp_path, written)
    rows = jsonl.newest(LocalStore(tmp_path)).lines
    assert 100 < len(rows) < 400
    assert rows == written[-len(rows) :]
    assert overview.read_row(str(tmp_path), HERE).step == 3000


def test_unreachable_store_is_a_row(runs, monkeypatch):
    def away(store):
        raise StoreError("the server does not answer")

    monkeypatch.setattr(lineage, "attempts", away)
    row = overview.read_row(f"{runs}/done", HERE)
    assert (row.state, row.reason) == ("unreadable", "the server does not answer")
    assert top.cells(row)[1] == "unreadable"


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=300))
def test_sparkline_is_short_and_reaches_the_edges(values):
    text = top.sparkline(values)
    assert len(text) == min(len(values), 16)
    assert set(text) <= set("▁▂▃▄▅▆▇█")


def test_sparkline_descends_with_the_values():
    assert top.sparkline([float(8 - i) for i in range(8)]) == "█▇▆▅▄▃▂▁"
    assert top.sparkline([1.0, 1.0]) == "▅▅"


@pytest.mark.parametrize(("arguments", "text"), [
    (["{}/nope"], "does not exist, or is empty"), (["{}/exports"], "does not exist, or is empty"),
    (["{}", "every_s=0"], "every_s  0.0 is too small (nearest: 0.1)"),
    (["{}", "every_s=1e6"], "every_s  1000000.0 is too large (nearest: 86400)"),
    (["{}", "every_s=x", "store.retries=-1", "store.retry=2"], "3 problems in the arguments"),
    (["{}", "--onc"], "did you mean '--once'?"), (["--once"], "1 to 1000 paths needed"),
])  # fmt: skip
def test_top_rejects_bad_arguments(runs, capsys, arguments, text):
    code, out, err = rendered(capsys, *(one.replace("{}", str(runs)) for one in arguments))
    assert (code, out) == (2, "")
    assert text in err
    assert "Traceback" not in err


def test_top_refreshes_on_a_terminal_until_ctrl_c(runs):
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.top", str(runs), "every_s=0.1"],
        cwd=runs, stdout=other, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "999", "TERM": "xterm"},
    )  # fmt: skip  # on fewer columns, a long path is folded
    os.close(other)
    seen, came = b"", False
    try:
        while b"later" not in seen:  # a run that began meanwhile
            seen += os.read(main, 65536)
            if b"alive" in seen and not came:
                shutil.copytree(runs / "done", runs / "later")
                came = True
        process.send_signal(signal.SIGINT)
        while True:
            try:
                if not os.read(main, 65536):
                    break
            except OSError:  # a terminal whose other side is closed
                break
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(main)


BESTS = st.builds(
    Best,
    metric=st.sampled_from(["accuracy", "loss"]),
    mode=st.sampled_from(["min", "max"]),
    value=st.floats(-2, 2),
    step=st.integers(0, 9),
)


@given(st.lists(st.none() | BESTS))
def test_rows_of_one_metric_are_ordered_by_best_value(bests):
    rows = [overview.Row(f"r{i}", "finished", best=best) for i, best in enumerate(bests)]
    in_order = [row.best for row in overview.ordered(rows)]
    measured = [best for best in in_order if best is not None]
    assert in_order == measured + [None] * (len(bests) - len(measured))
    groups = [key for key, _ in groupby(measured, lambda best: (best.metric, best.mode))]
    assert len(groups) == len(set(groups))
    for metric, mode in groups:
        values = [best.value for best in measured if (best.metric, best.mode) == (metric, mode)]
        assert values == sorted(values, reverse=mode == "max")


def test_best_value_outside_of_the_newest_lines_is_that_of_the_record(tmp_path):
    best = {"metric": "accuracy", "value": 0.99, "step": 7}
    write(tmp_path / "a", lines(), records=[second(best=best)])
    assert overview.read_row(str(tmp_path / "a"), HERE).best == Best("accuracy", "max", 0.99, 7)
    for other in ({**best, "metric": "f1"}, {**best, "value": "x"}, {**best, "step": None}, [1]):
        write(tmp_path / "b", lines(), records=[second(best=other)])
        row = overview.read_row(str(tmp_path / "b"), HERE)
        assert row.best == Best("accuracy", "max", 0.9, 30)  # from the lines


def test_run_that_stopped_early_shows_its_reason_and_best_value(tmp_path, capsys):
    reason = "accuracy did not improve in 3 evaluations; best 0.9 at step 30"
    write(tmp_path / "a", lines(), records=[{**second(), "reason": reason}])
    _, out, _ = rendered(capsys, tmp_path, "--once")
    _, row, text = out.splitlines()
    assert "finished early" in row
    assert "accuracy 0.9 at 30" in row
    assert text == f"{tmp_path}/a: {reason}"
    _, out, _ = rendered(capsys, tmp_path, "--json")
    (row,) = json.loads(out)["runs"]
    assert row["best"] == {"metric": "accuracy", "mode": "max", "value": 0.9, "step": 30}
    assert (row["state"], row["why"]) == ("finished", reason)


def test_rows_without_a_best_value_are_ordered_by_urgency():
    states = (
        "finished",
        "silent",
        "running",
        "unreadable",
        "stopped",
        "starting",
        "died",
        "unknown",
    )
    rows = [overview.Row(f"r{i}", state) for i, state in enumerate(states)]
    assert [row.state for row in overview.ordered(rows)] == [
        "running", "starting", "unreadable", "silent", "died", "stopped", "unknown", "finished",
    ]  # fmt: skip
    assert overview.ordered([replace(rows[0], run="b"), replace(rows[0], run="a")])[0].run == "a"


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_narrow_terminal_hides_columns(width):
    row = overview.Row("runs/a", "silent", "", time.time() - 800, 2640, 2640, None, [1e-5] * 20,
                    "accuracy", 0.9916, 40, None, 2640, time.time() - 800, [1, 2])  # fmt: skip
    screen = Console(width=width, file=io.StringIO(), color_system=None)
    screen.print(top._table([row], width))
    head, *below = screen.file.getvalue().rstrip().splitlines()
    assert len(below) == 1
    assert re.search("silent 1[34] min ago", below[0])
    assert "…" not in below[0]
    assert ("evaluation" in head) == (width >= 85)
