"""What a person sees on a terminal and in a log file, and how long a run is said to take."""

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


def line(step, split="train", **figures):
    position = {"step": step, "epoch": step // 400, "samples": 4 * step, "time": 1.5}
    return {**position, "split": split, **figures}


def a_save(step, stall_s=0.5):
    """A save that began just now, whatever the clock does meanwhile."""
    return {"step": step, "time": time.time() + 1000, "stall_s": stall_s}


# --- a log file ----------------------------------------------------------------------------------


def test_the_text_of_a_log_file(capsys):
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


def test_training_lines_keep_their_distance_and_evaluations_do_not(capsys):
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


def terminal(monkeypatch, made=None, columns=80, term="xterm"):
    """Make standard output a terminal; call it in the test itself."""
    made = made or Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.delenv("NO_COLOR", raising=False)
    return made


def an_attempt(console, **where):
    console.start(facts(step=410, **where))
    console.log(line(500, **{"loss": 0.5, "top[5]": 0.25, "lr": 0.1, "step_p50_s": 1.0}))
    console.saved(a_save(500))
    console.log(line(500, "eval", **{"loss": 0.5, "top[5]": 0.75}))
    console.message("a [/sentence] in brackets")
    console.close()


def test_on_a_terminal_bars_move_and_sentences_stand_above_them(monkeypatch):
    screen = terminal(monkeypatch)
    an_attempt(Console())
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    assert "eval   step 500/1,200  loss 0.5000  top[5] 0.7500" in shown
    assert "a [/sentence] in brackets" in shown
    *_, epoch, run, figures, end = shown.split("\n")
    assert re.fullmatch(r"epoch 2/3 [━╸╺]+ +100/400 *", epoch)
    assert re.fullmatch(r"run       [━╸╺]+ +500/1,200 0:11:42 left", run)
    assert figures.strip() == "loss 0.5000  top[5] 0.2500  lr 0.1  saved 0:00:00 ago"
    assert end == ""
    assert max(map(len, shown.split("\n"))) <= 80


def test_without_a_known_length_of_an_epoch_there_is_one_bar(monkeypatch):
    screen = terminal(monkeypatch)
    an_attempt(Console(), steps_per_epoch=None)
    assert "epoch" not in screen.getvalue()
    assert "500/1,200" in screen.getvalue()


def test_a_narrow_terminal_cuts_the_figures(monkeypatch):
    screen = terminal(monkeypatch, columns=40)
    an_attempt(Console())
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")
    assert max(map(len, shown.split("\n"))) <= 40
    assert "…" in shown


def test_the_last_step_is_still_in_the_last_epoch(monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts(step=1200))
    console.close()
    assert "epoch 3/3" in screen.getvalue()
    assert "400/400" in screen.getvalue()


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch, term):
    screen = terminal(monkeypatch, term=term)
    an_attempt(Console(every_s=0.0))
    assert "\x1b" not in screen.getvalue()
    assert len(screen.getvalue().splitlines()) == 3


def test_no_color_is_respected(monkeypatch):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9;]*m")
    for wanted in (False, True):
        screen = terminal(monkeypatch)
        if not wanted:
            monkeypatch.setenv("NO_COLOR", "1")
        an_attempt(Console())
        assert bool(colour.search(screen.getvalue())) is wanted


def test_a_real_terminal_is_left_as_it_was(monkeypatch):
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(inner)
    with os.fdopen(inner, "w") as screen:
        terminal(monkeypatch, screen)
        an_attempt(Console())
        assert sys.stdout is screen
        assert termios.tcgetattr(inner) == before
        screen.flush()
        shown = os.read(outer, 1 << 16).decode()
    os.close(outer)
    assert "━" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")  # the cursor is there
    assert shown.replace("\x1b[?25h", "").endswith("\r\n")


def test_a_process_that_is_killed_leaves_a_cursor(monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts())
    shown = screen.getvalue()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    console.close()


def test_a_forked_process_has_the_stream_itself(monkeypatch):
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
def test_the_estimate_is_what_such_a_run_takes(every, saves, per_epoch, end, start, log_every):
    """A run whose steps, evaluations and saves take the same each time, as its lines tell it."""
    where = facts(max_steps=end, steps_per_epoch=per_epoch, eval_every=every, save_every=saves)
    estimate = Estimate(where)
    step_s, eval_s, stall_s = 0.5, 7.0, 0.25

    def due(each, step):
        epochs, rest = divmod(step, per_epoch) if per_epoch else (0, 1)
        return policy.due(each, step=step, epoch=epochs, epoch_ended=rest == 0, final=step == end)

    def run(steps, tell):
        now_s = 0.0
        for step in steps:
            now_s += step_s
            if tell and step % log_every == 0:
                estimate.take(line(step), now_s)
            if due(every, step):
                now_s += eval_s
                if tell:
                    estimate.take(line(step, "eval", eval_s=eval_s), now_s)
            if due(saves, step):
                now_s += stall_s
                if tell:
                    estimate.saved({"stall_s": stall_s})
        return now_s

    begun = min(start, end)
    run(range(1, begun + 1), tell=True)
    left_s = estimate.left_s(begun)
    if begun // log_every < 2:
        assert left_s is None
        return
    seen = {each: any(due(each, step) for step in range(1, begun + 1)) for each in (every, saves)}
    unseen_s = sum(
        cost_s * sum(due(each, step) for step in range(begun + 1, end + 1))
        for each, cost_s in ((every, eval_s), (saves, stall_s)) if not seen[each]
    )  # fmt: skip
    assert math.isclose(left_s, run(range(begun + 1, end + 1), tell=False) - unseen_s)


def test_saves_by_the_clock_count():
    estimate = Estimate(facts(save_every=Every(), save_every_s=60.0))
    estimate.take(line(0, step_p50_s=1.0), 0.0)
    estimate.saved({"stall_s": 30.0})
    assert estimate.left_s(600) == 600 + 10 * 30


def test_a_known_peak_gives_the_share_of_it_that_is_used(capsys):
    console = Console(every_s=0.0)
    console.start(facts(peak_flops_per_s=1e12))
    clocked = {"step_p50_s": 0.1, "data_wait_s": 1.0, "save_stall_s": 0.0}
    console.log(line(5, loss=0.5, samples_per_s=20.0, flops_per_s=4.125e11, **clocked))
    shown = capsys.readouterr().out
    assert shown.startswith("train  step 5/1,200  loss 0.5000  20 samples/s  MFU 41.2 %")
