"""Console output on a terminal and in a log file, and the estimate of the remaining time."""

import fcntl
import io
import math
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core import intervals as policy
from trainer.core.intervals import Every
from trainer.tracking.console import Console
from trainer.tracking.estimate import Estimate


def facts(*, step=0, **more):
    return {
        "step": step, "last_eval_step": step, "max_steps": 1200, "steps_per_epoch": 400,
        "eval_every": Every(epochs=1), "save_every": Every(steps=300), "save_every_s": None,
        **more,
    }  # fmt: skip


def line(step, split="train", **metrics):
    position = {"step": step, "epoch": step // 400, "samples": 4 * step, "time": 1.5}
    return {**position, "split": split, **metrics}


def a_save(step, stall_s=0.5):
    """A save that started now, independent of clock changes."""
    return {"step": step, "time": time.time() + 1000, "stall_s": stall_s}


# --- a log file ----------------------------------------------------------------------------------


def test_console_log_file_lines(capsys):
    console = Console(every_s=0.0)
    console.start(facts())
    console.message("banner")
    console.log(line(
        10, loss=2.30258, accuracy=0.25, grad_norm=1e-4, lr=0.001, skipped=0.0,
        samples_per_s=1234.5, step_p50_s=0.5, step_p95_s=0.6, data_wait_s=0.0,
    ))  # fmt: skip
    console.saved(a_save(300))
    console.log(line(
        400, loss=0.5, lr=1.2345e-5, skipped=2.0, tokens_per_s=98765.4, samples_per_s=12.3,
        flops_per_s=1e12, step_p50_s=0.5,
    ))  # fmt: skip
    console.log(line(400, "eval", loss=0.125, accuracy=1.0, eval_s=20.0))
    console.log(line(1200, loss=123456.0, step_p50_s=0.5))
    console.close()
    assert capsys.readouterr().out.splitlines() == [
        "banner",
        "train  step 10/1,200  loss 2.3026  accuracy 0.2500  grad_norm 0.0001  lr 0.001"
        "  1,234 samples/s  0:09:55 left",
        "train  step 400/1,200  loss 0.5000  lr 1.23e-05  skipped 2  98,765 tokens/s"
        "  0:06:42 left  saved 0:00:00 ago",  # 800 steps, 3 saves of half a second
        "eval   step 400/1,200  loss 0.1250  accuracy 1.0000",
        "train  step 1,200/1,200  loss 1.23e+05  0:00:00 left  saved 0:00:00 ago",
    ]


def test_console_throttles_training_lines_only(capsys):
    console = Console(every_s=1e9)
    console.start(facts())
    for step in range(1, 9):
        console.log(line(step, loss=1.0))
    console.log(line(8, "eval", loss=1.0))
    assert [text[:4] for text in capsys.readouterr().out.splitlines()] == ["eval"]


# --- a terminal ----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch, terminals=None, columns=80, term="xterm"):
    """Make standard output a terminal; call it in the test itself."""
    terminals = terminals or Terminal()
    monkeypatch.setattr(sys, "stdout", terminals)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminals


def an_attempt(console, **where):
    console.start(facts(step=410, **where))
    console.log(line(500, **{"loss": 0.5, "top[5]": 0.25, "lr": 0.1, "step_p50_s": 1.0}))
    console.saved(a_save(500))
    console.log(line(500, "eval", **{"loss": 0.5, "top[5]": 0.75}))
    console.message("a [/sentence] in brackets")
    console.close()


def test_console_bars_advance_below_messages(monkeypatch):
    screen = terminal(monkeypatch)
    an_attempt(Console())
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    assert "eval   step 500/1,200  loss 0.5000  top[5] 0.7500" in output
    assert "a [/sentence] in brackets" in output
    *_, epoch, run, metrics, end = output.split("\n")
    assert re.fullmatch(r"epoch 2/3 [━╸╺]+ +100/400 *", epoch)
    assert re.fullmatch(r"run       [━╸╺]+ +500/1,200 0:11:42 left", run)
    assert metrics.strip() == "loss 0.5000  top[5] 0.2500  lr 0.1  saved 0:00:00 ago"
    assert end == ""
    assert max(map(len, output.split("\n"))) <= 80


def test_console_without_epoch_length_shows_one_bar(monkeypatch):
    screen = terminal(monkeypatch)
    an_attempt(Console(), steps_per_epoch=None)
    assert "epoch" not in screen.getvalue()
    assert "500/1,200" in screen.getvalue()


def test_console_narrow_terminal_truncates_metrics(monkeypatch):
    screen = terminal(monkeypatch, columns=40)
    an_attempt(Console())
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    assert max(map(len, output.split("\n"))) <= 40
    assert "…" in output


def test_console_last_step_is_in_the_last_epoch(monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts(step=1200))
    console.close()
    assert "epoch 3/3" in screen.getvalue()
    assert "400/400" in screen.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_console_dumb_terminal_gets_lines(monkeypatch, term):
    screen = terminal(monkeypatch, term=term)
    an_attempt(Console(every_s=0.0))
    assert "\x1b" not in screen.getvalue()
    assert len(screen.getvalue().splitlines()) == 3


def test_console_respects_no_color(monkeypatch):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9;]*m")
    for expected in (False, True):
        screen = terminal(monkeypatch)
        if not expected:
            monkeypatch.setenv("NO_COLOR", "1")
        an_attempt(Console())
        assert bool(colour.search(screen.getvalue())) is expected


def test_console_restores_the_terminal(monkeypatch):
    outer, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(child)
    with os.fdopen(child, "w") as screen:
        terminal(monkeypatch, screen)
        an_attempt(Console())
        assert sys.stdout is screen
        assert termios.tcgetattr(child) == before
        screen.flush()
        output = os.read(outer, 1 << 16).decode()
    os.close(outer)
    assert "━" in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")  # the cursor is there
    assert output.replace("\x1b[?25h", "").endswith("\r\n")


def test_console_killed_process_leaves_a_cursor(monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts())
    output = screen.getvalue()
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")
    console.close()


def test_console_forked_process_has_the_original_streams(monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts())
    assert sys.stdout is not screen  # what is printed goes above the bars
    child = os.fork()
    if child == 0:
        os._exit(0 if sys.stdout is screen else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    console.close()
    assert sys.stdout is screen


# --- what is left --------------------------------------------------------------------------------

intervals = st.builds(Every, st.none() | st.integers(1, 9), st.none() | st.integers(1, 4))


@given(
    every=intervals, saves=intervals, per_epoch=st.none() | st.integers(1, 7),
    end=st.integers(1, 60), start=st.integers(0, 60), log_every=st.integers(1, 5),
)  # fmt: skip
def test_estimate_matches_a_simulated_run(every, saves, per_epoch, end, start, log_every):
    """A run whose steps, evaluations and saves take the same each time, as its lines tell it."""
    where = facts(max_steps=end, steps_per_epoch=per_epoch, eval_every=every, save_every=saves)
    estimate = Estimate(where)
    step_s, eval_s, stall_s = 0.5, 7.0, 0.25

    def due(step_, step):
        epochs, rest = divmod(step, per_epoch) if per_epoch else (0, 1)
        return policy.due(step_, step=step, epoch=epochs, epoch_ended=rest == 0, final=step == end)

    def run(steps, tell):
        now_s = 0.0
        for step in steps:
            now_s += step_s
            if tell and step % log_every == 0:
                estimate.add(line(step), now_s)
            if due(every, step):
                now_s += eval_s
                if tell:
                    estimate.add(line(step, "eval", eval_s=eval_s), now_s)
            if due(saves, step):
                now_s += stall_s
                if tell:
                    estimate.saved({"stall_s": stall_s})
        return now_s

    started = min(start, end)
    run(range(1, started + 1), tell=True)
    remaining_s = estimate.remaining_s(started)
    if started // log_every < 2:
        assert remaining_s is None
        return
    seen = {
        step_: any(due(step_, step) for step in range(1, started + 1)) for step_ in (every, saves)
    }
    unseen_s = sum(
        cost_s * sum(due(step_, step) for step in range(started + 1, end + 1))
        for step_, cost_s in ((every, eval_s), (saves, stall_s)) if not seen[step_]
    )  # fmt: skip
    assert math.isclose(remaining_s, run(range(started + 1, end + 1), tell=False) - unseen_s)


def test_estimate_includes_saves_by_interval():
    estimate = Estimate(facts(save_every=Every(), save_every_s=60.0))
    estimate.add(line(0, step_p50_s=1.0), 0.0)
    estimate.saved({"stall_s": 30.0})
    assert estimate.remaining_s(600) == 600 + 10 * 30


def test_console_shows_mfu_with_a_known_peak(capsys):
    console = Console(every_s=0.0)
    console.start(facts(peak_flops_per_s=1e12))
    clocked = {"step_p50_s": 0.1, "data_wait_s": 1.0, "save_stall_s": 0.0}
    console.log(line(5, loss=0.5, samples_per_s=20.0, flops_per_s=4.125e11, **clocked))
    output = capsys.readouterr().out
    assert output.startswith("train  step 5/1,200  loss 0.5000  20 samples/s  MFU 41.2 %")
