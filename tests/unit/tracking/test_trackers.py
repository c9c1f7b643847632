"""Lines that survive a kill, several trackers at once, and trackers that do nothing."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.schema import Run
from trainer.errors import ConfigError
from trainer.storage import open_store
from trainer.tracking import jsonl, libraries
from trainer.tracking.console import Console
from trainer.tracking.guarded import Guarded
from trainer.tracking.jsonl import FILE_NAME, SAVES_NAME, Jsonl
from trainer.tracking.several import Several, Silent
from trainer.tracking.tensorboard import TensorBoard
from trainer.tracking.wandb import Wandb
from trainer.training import build


def facts(folder, *, step=0, last_eval_step=0):
    return {
        "run_dir": str(folder), "step": step, "last_eval_step": last_eval_step, "max_steps": 30,
        "steps_per_epoch": 10, "world_size": 1, "config": {}, "attempt": 1, "run_id": "one",
        "store": open_store(str(folder)),
    }  # fmt: skip


def line(step, split="train", **metrics):
    position = {"step": step, "epoch": step // 10, "samples": 4 * step, "time": 1.5}
    return {**position, "split": split, **metrics}


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


def test_jsonl_start_creates_directory_and_file(tmp_path):
    started(tmp_path / "deep" / "run")
    assert parsed(tmp_path / "deep" / "run") == []


@pytest.mark.parametrize(("step", "last_eval_step", "retained"), [
    (20, 20, [(5, "train"), (10, "train"), (10, "eval"), (15, "train"), (20, "eval")]),
    (15, 10, [(5, "train"), (10, "train"), (10, "eval"), (15, "train")]),
    (20, 10, [(5, "train"), (10, "train"), (10, "eval"), (15, "train")]),  # 20 is evaluated again
    (14, 10, [(5, "train"), (10, "train"), (10, "eval")]),
    (10, 0, [(5, "train"), (10, "train")]),  # saved at 10 before its evaluation was complete
    (0, 0, []),
])  # fmt: skip
def test_jsonl_start_drops_lines_after_the_first_step(run, step, last_eval_step, retained):
    started(run, step=step, last_eval_step=last_eval_step)
    assert [(one["step"], one["split"]) for one in parsed(run)] == retained


def test_jsonl_retained_lines_have_the_same_bytes(run):
    before = (run / FILE_NAME).read_bytes()
    started(run, step=20, last_eval_step=20)
    assert (run / FILE_NAME).read_bytes() == before


@pytest.mark.parametrize("tail", [
    b'{"step": 20, "epo', b"{", b'{"step": 20, "split": "train", "\xc3', b"\0\0\0",
])  # fmt: skip
def test_jsonl_truncated_last_line_is_dropped(run, tail):
    before = parsed(run)
    with open(run / FILE_NAME, "ab") as file:
        file.write(tail)
    started(run, line(25, loss=0.1), step=30, last_eval_step=30)
    assert parsed(run) == [*before, line(25, loss=0.1)]


def test_jsonl_last_line_without_newline_is_retained(run):
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
def test_salvage_skips_and_counts_damaged_lines(run, damage, where):
    before = parsed(run)
    texts = (run / FILE_NAME).read_bytes().splitlines()
    (run / FILE_NAME).write_bytes(b"\n".join([*texts[:where], damage, *texts[where:], b""]))
    result = jsonl.salvage(open_store(str(run)))
    assert (result.lines, result.damaged) == (before, 1)
    assert jsonl.newest(open_store(str(run))).lines == before


@given(st.binary(max_size=300), st.integers(0, 400))
@settings(max_examples=50)
def test_salvage_survives_any_bytes(tmp_path_factory, noise, where):
    folder = tmp_path_factory.mktemp("noise")
    data = b"".join(json.dumps(line(step, loss=0.5)).encode() + b"\n" for step in range(1, 5))
    (folder / FILE_NAME).write_bytes(data[:where] + noise + data[where:])
    result = jsonl.salvage(open_store(str(folder)))
    assert len(result.lines) + result.damaged >= 3  # noise can hide the end of one line


def test_jsonl_metric_names_may_have_any_character(tmp_path):
    odd = line(1, **{"größe\u2028\x85\n": 1.0})
    started(tmp_path, odd)
    started(tmp_path, step=1)
    assert parsed(tmp_path) == [odd]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_jsonl_nonfinite_values_become_null(tmp_path, value):
    started(tmp_path, line(1, loss=value, accuracy=0.5))
    started(tmp_path, step=1)
    assert parsed(tmp_path) == [line(1, loss=None, accuracy=0.5)]


def test_floats_come_back_exactly(tmp_path):
    value = 0.1 + 0.2
    started(tmp_path, line(1, loss=value))
    assert parsed(tmp_path)[0]["loss"] == value


def test_jsonl_superseded_writer_cannot_change_the_new_file(run):
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
    assert sorted(path.name for path in run.iterdir()) == [FILE_NAME, SAVES_NAME]


def a_save(step, attempt):
    return {"step": step, "attempt": attempt, "time": 1.5, "save_s": 0.5, "stall_s": 0.0,
            "bytes": 7}  # fmt: skip


def test_saves_of_abandoned_timelines_stay(tmp_path):
    for attempt in (1, 2):
        tracker = Jsonl()
        tracker.start(facts(tmp_path, step=10, last_eval_step=10))
        tracker.saved(a_save(20, attempt))
        tracker.close()
    text = (tmp_path / SAVES_NAME).read_text()
    assert [json.loads(one) for one in text.splitlines()] == [a_save(20, 1), a_save(20, 2)]
    assert parsed(tmp_path) == []


# --- several and none --------------------------------------------------------------------------


class Remembers:
    def __init__(self, calls, name):
        self._calls, self._name = calls, name

    def __getattr__(self, method):
        return lambda *arguments: self._calls.append((self._name, method, *arguments))


def test_several_forwards_every_call_in_order(tmp_path):
    calls = []
    several = Several([Remembers(calls, "a"), Remembers(calls, "b")])
    several.start({"step": 1})
    several.log({"step": 2})
    several.message("hello")
    several.saved({"step": 3})
    several.flush()
    several.ended("done")
    several.close()
    expected = [
        ("start", {"step": 1}), ("log", {"step": 2}), ("message", "hello"), ("saved", {"step": 3}),
        ("flush",), ("ended", "done"), ("close",),
    ]  # fmt: skip
    assert calls == [(name, *call) for call in expected for name in ("a", "b")]


@pytest.mark.parametrize("make", [
    Jsonl, Console, Silent, lambda: Several([]), lambda: Several([Jsonl(), Silent()]), TensorBoard,
    lambda: Guarded("x", Console()), lambda: Wandb(mode="disabled"),
])  # fmt: skip
def test_every_tracker_accepts_every_call_in_any_state(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    tracker = make()
    tracker.close()  # an attempt that failed before it began
    tracker.flush()
    tracker.start(facts(tmp_path))
    tracker.log(line(1, loss=1.0))
    tracker.message("hello")
    for name, argument in (("saved", a_save(1, 1)), ("ended", "done")):
        getattr(tracker, name, lambda argument: None)(argument)
    tracker.flush()
    tracker.close()
    tracker.close()


def test_silent_is_silent(tmp_path, capsys):
    silent = Silent()
    silent.start(facts(tmp_path))
    silent.log(line(1))
    silent.message("hello")
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
def test_jsonl_joined_parts_equal_a_file(tmp_path_factory, attempts):
    """An attempt is: steps committed, steps lost, closed or not, evaluated or not."""
    folder = tmp_path_factory.mktemp("run")
    store = open_store(f"memory:/{folder}")
    committed = evaluated = 0
    for number, (retained, lost, closes, evaluates) in enumerate(
        [*attempts, (2, 0, True, True)], 1
    ):
        facts = {"step": committed, "last_eval_step": evaluated, "attempt": number, "store": store}
        trackers = [Jsonl(), Jsonl()]
        for tracker, location in zip(trackers, (str(folder), store.url), strict=True):
            tracker.start({**facts, "run_dir": location})
        for step in range(committed + 1, committed + retained + 1):
            for tracker in trackers:
                tracker.log(a_line("train", step, number))
                if evaluates:
                    tracker.log(a_line("eval", step, number))
                tracker.flush()
        evaluated = committed + retained if evaluates else evaluated
        committed += retained
        for step in range(committed + 1, committed + lost + 1):
            for tracker in trackers:
                tracker.log(a_line("train", step, number))
        if closes:
            for tracker in trackers:
                tracker.close()
        else:  # killed; only what the interpreter would complain of
            trackers[0]._lines._file.close()
            trackers[0]._saves._file.close()
    as_file = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert jsonl.read(store) == as_file
    assert jsonl.read(store, SAVES_NAME) == []
    assert store.list("") == [FILE_NAME, SAVES_NAME]


@given(attempts=st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=5))
@settings(max_examples=40, deadline=None)
def test_jsonl_flushed_saves_are_stored_once_on_an_object_store(tmp_path_factory, attempts):
    """An attempt is: number of saves, closed or not."""
    store = open_store(f"memory:/{tmp_path_factory.mktemp('run')}")
    expected = []
    for number, (saves, closes) in enumerate([*attempts, (1, True)], 1):
        tracker = Jsonl()
        where = {"step": 0, "last_eval_step": 0, "attempt": number, "store": store}
        tracker.start({**where, "run_dir": store.url})
        for step in range(saves):
            tracker.saved(a_save(step, number))
            tracker.flush()
            expected.append(a_save(step, number))
        if closes:
            tracker.close()
        assert jsonl.read(store, SAVES_NAME) == expected
        assert jsonl.salvage(store, SAVES_NAME) == jsonl.Salvage(expected)


def test_salvage_skips_saves_that_are_joined_but_not_deleted(tmp_path):
    store = open_store(f"memory:/{tmp_path}")
    saves = [a_save(30, 1), a_save(20, 2), a_save(30, 2)]  # attempt 2 resumed before step 20
    store.replace(SAVES_NAME, "".join(json.dumps(one) + "\n" for one in saves[:2]).encode())
    for number, one in enumerate(saves[1:], 1):
        store.replace(f"saves/0002-{number:06d}.jsonl", (json.dumps(one) + "\n").encode())
    assert jsonl.salvage(store, SAVES_NAME) == jsonl.Salvage(saves)


@pytest.mark.parametrize("damage", ['{"step": 1, "attempt": [1]}', '{"attempt": 1}', "[1]", "{"])
def test_salvage_counts_damaged_saves(tmp_path, damage):
    (tmp_path / SAVES_NAME).write_text(f'{damage}\n{{"step": 2}}\n')
    assert jsonl.salvage(open_store(str(tmp_path)), SAVES_NAME) == jsonl.Salvage([{"step": 2}], 1)


# --- trackers that fail ---------------------------------------------------------------------------

METHODS = ["start", "log", "message", "saved", "flush", "ended", "close"]


class Fails(Silent):
    """Raises in one of its methods, and counts the calls of the others."""

    def __init__(self, method, error):
        self.calls = []
        for name in METHODS:
            setattr(self, name, self.fail if name == method else self.counted(name))
        self.error = error

    def fail(self, *arguments):
        raise self.error

    def counted(self, name):
        return lambda *arguments: self.calls.append(name)


def an_attempt(tracker, folder):
    tracker.start(facts(folder))
    for step in (1, 2):
        tracker.log(line(step, loss=0.5))
        tracker.message("hello")
        tracker.saved(a_save(step, 1))
        tracker.flush()
    tracker.ended("done")
    tracker.close()


@pytest.mark.parametrize("method", METHODS)
def test_guarded_disables_a_failing_tracker_and_reports_it_once(method, tmp_path, capsys):
    bad, good = Fails(method, ZeroDivisionError("its own bug")), Fails(None, None)
    an_attempt(Several([Jsonl(), Guarded("mine", bad), Guarded("other", good)]), tmp_path)
    assert [one["step"] for one in parsed(tmp_path)] == [1, 2]
    assert good.calls == ["start", *METHODS[1:5], *METHODS[1:5], "ended", "close"]
    before = {"start": [], "ended": good.calls[:-2], "close": good.calls[:-1]}
    first = METHODS[: METHODS.index(method)]
    assert bad.calls == before.get(method, first) + ["close"] * (method != "close")
    warning = capsys.readouterr().err
    assert warning.count("warning: tracker.mine is disabled for this attempt") == 1
    assert f": {method}() raised ZeroDivisionError: its own bug ({__file__}:" in warning
    assert warning.count("\n") == 1


def test_guarded_raises_configuration_errors_from_start(tmp_path):
    guarded = Guarded("mine", Fails("start", ConfigError("mine.key is wrong")))
    with pytest.raises(ConfigError, match=r"mine\.key"):
        guarded.start(facts(tmp_path))


def test_guarded_rejects_an_object_without_the_required_methods():
    with pytest.raises(ConfigError, match=r"mine: object is not a tracker, .* start, log, message"):
        Guarded("mine", object())


class Minimal:
    """A tracker without the optional methods."""

    start = log = message = staticmethod(lambda argument: None)
    flush = close = staticmethod(lambda: None)


def test_guarded_accepts_a_tracker_without_optional_methods(tmp_path, capsys):
    an_attempt(Several([Guarded("mine", Minimal())]), tmp_path)
    assert capsys.readouterr().err == ""


def test_guarded_accepts_the_old_method_name_say_with_one_warning(tmp_path, capsys):
    texts = []

    class Old(Minimal):
        message = None

    Old.say = staticmethod(texts.append)
    an_attempt(Several([Guarded("mine", Old())]), tmp_path)
    assert texts == ["hello", "hello"]
    assert capsys.readouterr().err == (
        'warning: tracker.mine: Old has a method "say", which is now called "message"; rename the '
        "method, the old name will stop working\n"
    )


def test_missing_reports_a_library_and_ignores_folders_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "wandb_of_old").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert libraries.missing("json", "x") == ""
    for name in ("wandb_of_old", "no_such_library"):
        assert libraries.missing(name, "x").endswith("pip install 'perdure[x]'")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_missing_library_is_a_configuration_problem(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    target = {"wandb": Wandb, "tensorboard": TensorBoard}[name]
    node = {"_target_": f"{target.__module__}.{target.__name__}"}
    (problem,) = [p for p in build.check(Run(tracker={name: node})) if p.key == f"tracker.{name}"]
    assert f"pip install 'perdure[{name}]'" in problem.text
    with pytest.raises(ConfigError, match="not installed"):
        target()
