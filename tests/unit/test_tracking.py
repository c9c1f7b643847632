"""Lines that survive a kill, figures that a person can read, and trackers that do nothing."""

import io
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.storage import open_store
from trainer.tracking import jsonl
from trainer.tracking.console import Console
from trainer.tracking.jsonl import FILE_NAME, Jsonl
from trainer.tracking.several import Several, Silent


def facts(folder, *, step=0, last_eval_step=0):
    return {
        "run_dir": str(folder), "step": step, "last_eval_step": last_eval_step, "max_steps": 30,
        "steps_per_epoch": 10, "world_size": 1, "config": {},
    }  # fmt: skip


def line(step, split="train", **figures):
    position = {"step": step, "epoch": step // 10, "samples": 4 * step, "time": 1.5}
    return {**position, "split": split, **figures}


def parsed(folder):
    def no_constant(text):
        raise AssertionError(f"{text} is not strict JSON")

    text = (folder / FILE_NAME).read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(one, parse_constant=no_constant) for one in text.split("\n")[:-1]]


def started(folder, *lines, **where):
    """Begin an attempt, log some lines, end it."""
    tracker = Jsonl()
    tracker.start(facts(folder, **where))
    for one in lines:
        tracker.log(one)
    tracker.close()


@pytest.fixture
def run(tmp_path):
    """The directory of a run that has three training lines and two evaluations."""
    folder = tmp_path / "run"
    started(
        folder, line(5, loss=0.5), line(10, loss=0.4), line(10, "eval", loss=0.45),
        line(15, loss=0.3), line(20, "eval", loss=0.35),
    )  # fmt: skip
    return folder


# --- metrics.jsonl -----------------------------------------------------------------------------


def test_every_line_is_one_json_object(run):
    assert parsed(run)[2] == line(10, "eval", loss=0.45)
    assert len(parsed(run)) == 5


def test_the_directory_is_made_and_the_file_is_there_from_the_start(tmp_path):
    started(tmp_path / "deep" / "run")
    assert parsed(tmp_path / "deep" / "run") == []


@pytest.mark.parametrize(("step", "last_eval_step", "kept"), [
    (20, 20, [(5, "train"), (10, "train"), (10, "eval"), (15, "train"), (20, "eval")]),
    (15, 10, [(5, "train"), (10, "train"), (10, "eval"), (15, "train")]),
    (20, 10, [(5, "train"), (10, "train"), (10, "eval"), (15, "train")]),  # 20 is evaluated again
    (14, 10, [(5, "train"), (10, "train"), (10, "eval")]),
    (10, 0, [(5, "train"), (10, "train")]),  # saved at 10 before its evaluation was complete
    (0, 0, []),
])  # fmt: skip
def test_the_file_is_cut_back_to_where_the_attempt_starts(run, step, last_eval_step, kept):
    started(run, step=step, last_eval_step=last_eval_step)
    assert [(one["step"], one["split"]) for one in parsed(run)] == kept


def test_lines_that_stay_are_the_same_bytes(run):
    before = (run / FILE_NAME).read_bytes()
    started(run, step=20, last_eval_step=20)
    assert (run / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("tail", [
    b'{"step": 20, "epo', b"{", b'{"step": 20, "split": "train", "\xc3', b"\0\0\0",
])  # fmt: skip
def test_a_last_line_that_was_cut_short_is_dropped(run, tail):
    before = parsed(run)
    with open(run / FILE_NAME, "ab") as file:
        file.write(tail)
    started(run, line(25, loss=0.1), step=30, last_eval_step=30)
    assert parsed(run) == [*before, line(25, loss=0.1)]


def test_a_last_line_that_only_lacks_its_end_is_kept(run):
    text = (run / FILE_NAME).read_bytes()
    (run / FILE_NAME).write_bytes(text[:-1])
    started(run, step=30, last_eval_step=30)
    assert (run / FILE_NAME).read_bytes() == text


@pytest.mark.parametrize("damage", [
    b"{", b"[1]", b"3", b'"x"', b"\xff\xfe", b'{"step": 1}', b'{"step": -1, "split": "train"}',
    b'{"step": 1.5, "split": "train"}', b'{"step": true, "split": "train"}',
    b'{"step": 1, "split": null}', b"[" * 100_000,
])  # fmt: skip
@pytest.mark.parametrize("where", [0, 2, 5])
def test_for_people_damaged_lines_are_passed_over_and_counted(run, damage, where):
    before = parsed(run)
    texts = (run / FILE_NAME).read_bytes().splitlines()
    (run / FILE_NAME).write_bytes(b"\n".join([*texts[:where], damage, *texts[where:], b""]))
    found = jsonl.salvage(open_store(str(run)))
    assert (found.lines, found.damaged) == (before, 1)
    assert jsonl.newest(open_store(str(run))).lines == before


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=50)
def test_no_bytes_break_the_reading_for_people(tmp_path_factory, noise, where):
    folder = tmp_path_factory.mktemp("noise")
    data = b"".join(json.dumps(line(step, loss=0.5)).encode() + b"\n" for step in range(1, 5))
    (folder / FILE_NAME).write_bytes(data[:where] + noise + data[where:])
    found = jsonl.salvage(open_store(str(folder)))
    assert len(found.lines) + found.damaged >= 3  # noise can hide the end of one line


def test_names_may_hold_any_character(tmp_path):
    odd = line(1, **{"größe\u2028\x85\n": 1.0})
    started(tmp_path, odd)
    started(tmp_path, step=1)
    assert parsed(tmp_path) == [odd]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_json_has_no_number_for_becomes_null_and_stays_it(tmp_path, value):
    started(tmp_path, line(1, loss=value, accuracy=0.5))
    started(tmp_path, step=1)
    assert parsed(tmp_path) == [line(1, loss=None, accuracy=0.5)]


def test_floats_come_back_exactly(tmp_path):
    value = 0.1 + 0.2
    started(tmp_path, line(1, loss=value))
    assert parsed(tmp_path)[0]["loss"] == value


def test_a_writer_that_should_be_dead_cannot_touch_the_new_file(run):
    dead = Jsonl()
    dead.start(facts(run, step=20, last_eval_step=20))
    dead.log(line(21, loss=9.0))
    alive = Jsonl()
    alive.start(facts(run, step=10, last_eval_step=10))
    dead.log(line(22, loss=9.0))
    alive.log(line(11, loss=0.4))
    dead.log(line(23, loss=9.0))
    dead.close()
    alive.close()
    assert [one["step"] for one in parsed(run)] == [5, 10, 10, 11]


def test_lines_reach_the_file_as_they_come(tmp_path):
    tracker = Jsonl()
    tracker.start(facts(tmp_path))
    for step in (1, 2):
        tracker.log(line(step))
        assert [one["step"] for one in parsed(tmp_path)] == list(range(1, step + 1))
    tracker.close()


def test_no_temporary_file_is_left(run):
    started(run)
    assert [path.name for path in run.iterdir()] == [FILE_NAME]


# --- the console -------------------------------------------------------------------------------


def test_in_a_log_file_every_evaluation_and_now_and_then_training_is_a_line(tmp_path, capsys):
    console = Console(every_s=0.0)
    console.start(facts(tmp_path))
    console.log(line(5, loss=0.5, accuracy=0.25, lr=0.1, samples_per_s=1234.5))
    console.log(line(1000, "eval", loss=0.125, eval_s=2.0))
    console.say("a [sentence]")
    console.close()
    assert capsys.readouterr().out.splitlines() == [
        "train  step 5/30  loss 0.5000  accuracy 0.2500  1,234 samples/s",
        "eval   step 1,000/30  loss 0.1250",
        "a [sentence]",
    ]


def test_what_the_clock_measured_is_no_clutter_and_known_peaks_give_a_share(tmp_path, capsys):
    console = Console(every_s=0.0)
    console.start({**facts(tmp_path), "peak_flops_per_s": 1e12})
    clocked = {"step_p50_s": 0.1, "data_wait_s": 1.0, "tokens_per_s": 9e9, "save_stall_s": 0.0}
    console.log(line(5, loss=0.5, samples_per_s=20.0, flops_per_s=4.125e11, **clocked))
    assert capsys.readouterr().out == "train  step 5/30  loss 0.5000  20 samples/s  MFU 41.2 %\n"


def test_training_lines_keep_their_distance_and_evaluations_do_not(tmp_path, capsys):
    console = Console(every_s=1e9)
    console.start(facts(tmp_path))
    for step in range(1, 9):
        console.log(line(step, loss=1.0))
    console.log(line(8, "eval", loss=1.0))
    assert [text[:4] for text in capsys.readouterr().out.splitlines()] == ["eval"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Make standard output a terminal; call it in the test itself."""
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    return made


def test_on_a_terminal_a_bar_moves_and_sentences_stand_above_it(tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts(tmp_path, step=10))
    console.log(line(15, **{"loss": 0.5, "top[5]": 0.25}))
    console.log(line(20, "eval", **{"loss": 0.5, "top[5]": 0.75}))
    console.say("a [/sentence] in brackets")
    console.close()
    shown = screen.getvalue()
    assert "epoch 2/3" in shown
    assert "top[5] 0.2500" in shown
    assert "eval   step 20/30  loss 0.5000  top[5] 0.7500" in shown
    assert "a [/sentence] in brackets" in shown


def test_the_last_step_is_still_in_the_last_epoch(tmp_path, monkeypatch):
    screen = terminal(monkeypatch)
    console = Console()
    console.start(facts(tmp_path, step=30))
    console.close()
    assert "epoch 3/3" in screen.getvalue()


# --- several and none --------------------------------------------------------------------------


class Remembers:
    def __init__(self, calls, name):
        self._calls, self._name = calls, name

    def __getattr__(self, method):
        return lambda *arguments: self._calls.append((self._name, method, *arguments))


def test_several_pass_every_call_on_in_order(tmp_path):
    calls = []
    several = Several([Remembers(calls, "a"), Remembers(calls, "b")])
    several.start({"step": 1})
    several.log({"step": 2})
    several.say("hello")
    several.flush()
    several.close()
    expected = [
        ("start", {"step": 1}), ("log", {"step": 2}), ("say", "hello"), ("flush",), ("close",),
    ]  # fmt: skip
    assert calls == [(name, *call) for call in expected for name in ("a", "b")]


@pytest.mark.parametrize("make", [
    Jsonl, Console, Silent, lambda: Several([]), lambda: Several([Jsonl(), Silent()]),
])  # fmt: skip
def test_every_tracker_takes_every_call_in_any_state(make, tmp_path, capsys):
    tracker = make()
    tracker.close()  # an attempt that failed before it began
    tracker.flush()
    tracker.start(facts(tmp_path))
    tracker.log(line(1, loss=1.0))
    tracker.say("hello")
    tracker.flush()
    tracker.close()
    tracker.close()


def test_silent_is_silent(tmp_path, capsys):
    silent = Silent()
    silent.start(facts(tmp_path))
    silent.log(line(1))
    silent.say("hello")
    silent.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


# --- on an object store --------------------------------------------------------------------------

attempts = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans(), st.booleans()), max_size=6
)


def a_line(split, step, attempt):
    return {"split": split, "step": step, "attempt": attempt, "loss": step / 7}


@given(attempts=attempts)
@settings(max_examples=60, deadline=None)
def test_parts_of_attempts_are_joined_to_what_a_file_would_hold(tmp_path_factory, attempts):
    """Of each attempt: steps committed, steps lost, whether it closed, whether it evaluated."""
    folder = tmp_path_factory.mktemp("run")
    store = open_store(f"memory:/{folder}")
    committed = evaluated = 0
    for number, (kept, lost, closes, evaluates) in enumerate([*attempts, (2, 0, True, True)], 1):
        facts = {"step": committed, "last_eval_step": evaluated, "attempt": number, "store": store}
        trackers = [Jsonl(), Jsonl()]
        for tracker, place in zip(trackers, (str(folder), store.url), strict=True):
            tracker.start({**facts, "run_dir": place})
        for step in range(committed + 1, committed + kept + 1):
            for tracker in trackers:
                tracker.log(a_line("train", step, number))
                if evaluates:
                    tracker.log(a_line("eval", step, number))
                tracker.flush()
        evaluated = committed + kept if evaluates else evaluated
        committed += kept
        for step in range(committed + 1, committed + lost + 1):
            for tracker in trackers:
                tracker.log(a_line("train", step, number))
        if closes:
            for tracker in trackers:
                tracker.close()
        else:  # killed; only what the interpreter would complain of
            trackers[0]._file._file.close()
        assert jsonl.salvage(store) == jsonl.Salvage(jsonl.read(store))
        assert jsonl.newest(store).lines[-1:] == jsonl.read(store)[-1:]
    as_file = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert jsonl.read(store) == as_file
    assert store.list("") == ["metrics.jsonl"]
