"""Record of an attempt: heartbeats, and an end in any case."""

import json
import time

import pytest

from trainer.checkpoint import lineage
from trainer.checkpoint.replicas import Replicas
from trainer.cluster.world import World
from trainer.errors import StoreError
from trainer.storage import open_store
from trainer.training import attempt_record
from trainer.training.attempt_record import recorded


@pytest.fixture
def replicas(tmp_path):
    return Replicas(open_store(str(tmp_path / "run")), open_store(str(tmp_path / "mirror")))


def test_recorded_writes_the_outcome_to_both_stores(replicas):
    with recorded(replicas, {"resume": "auto"}, World()) as record:
        record.start_heartbeat(lambda: {"last_step": 7})
        record.outcome = {"outcome": "done"}
    for store in replicas.stores:
        (stored,) = lineage.records(store)
        assert (stored["outcome"], stored["last_step"]) == ("done", 7)
        assert "ended" in stored


def test_recorded_after_an_exception_writes_the_error_and_raises(replicas):
    with pytest.raises(ZeroDivisionError), recorded(replicas, {}, World()):
        raise ZeroDivisionError("a bug")
    (stored,) = replicas.records()
    assert (stored["outcome"], stored["error"]) == ("error", "ZeroDivisionError: a bug")
    assert "ended" in stored


def test_recorded_keeps_the_first_error(replicas):
    def crash():
        with recorded(replicas, {}, World()) as record:
            record.fail(StoreError("disk full"))
            raise SystemExit(1)

    with pytest.raises(SystemExit):
        crash()
    assert replicas.records()[0]["error"] == "StoreError: disk full"


def test_recorded_mirror_failure_is_a_warning(replicas, monkeypatch, capsys):
    amend = lineage.amend

    def fail_in_mirror(store, attempt, facts):
        if store is replicas.mirror:
            raise StoreError("no network")
        amend(store, attempt, facts)

    monkeypatch.setattr(lineage, "amend", fail_in_mirror)
    with recorded(replicas, {}, World()) as record:
        record.outcome = {"outcome": "done"}
    assert lineage.records(replicas.run)[0]["outcome"] == "done"
    assert "warning: the end of this attempt is not in the mirror" in capsys.readouterr().out


def test_heartbeat_stores_progress_before_the_end(replicas, monkeypatch, tmp_path):
    monkeypatch.setattr(attempt_record, "_FIRST_HEARTBEAT_S", 0.01)
    with recorded(replicas, {}, World()) as record:
        record.start_heartbeat(lambda: {"last_step": 3})
        file = tmp_path / "run/attempts/0001.last.json"
        deadline = time.monotonic() + 30
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(file.read_text())["last_step"] == 3
