"""The doctor: what it finds on this machine, and what it makes of machines that are worse."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainer.cluster.world import World
from trainer.config import targets
from trainer.config.compose import compose
from trainer.doctor import machine, places, slurm
from trainer.doctor.__main__ import main
from trainer.doctor.finding import Finding, summary, text
from trainer.doctor.model import sizes
from trainer.errors import StoreError
from trainer.storage import LocalStore
from trainer.training import build


def examined(capsys, *arguments):
    """Return the exit code, and {topic: findings}."""
    code = main([*arguments, "--json"])
    found = {}
    for each in json.loads(capsys.readouterr().out)["findings"]:
        found.setdefault(each["topic"], []).append(Finding(**each))
    return code, found


@pytest.fixture
def place(tmp_path):
    return f"run_dir={tmp_path}/run"


def test_on_this_machine_nothing_is_in_the_way_and_nothing_is_left(capsys, tmp_path, place):
    code, found = examined(capsys, place, "launch.device=cpu")
    assert code == 0
    assert {f.state for each in found.values() for f in each} == {"green"}
    assert {"configuration", "versions", "devices", "signals", "model", "run_dir"} <= set(found)
    assert "writes" in found["run_dir"][-1].found
    assert list(tmp_path.iterdir()) == []


def test_text_has_a_line_for_each_finding_and_the_advice_below(capsys, place):
    assert main(["--quick", place]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"Nothing is in the way: {len(lines)} ok, 0 look, 0 BAD."
    assert all(line.startswith("ok    ") for line in lines)
    shown = text([Finding("a", "green", "fine"), Finding("long one", "red", "broken", "do this")])
    assert shown.splitlines() == [
        "ok    a         fine", "BAD   long one  broken", " " * 16 + "-> do this"
    ]  # fmt: skip
    assert "would not work" in summary([Finding("a", "red", "x")])


def test_a_configuration_with_problems_ends_with_2_and_all_of_them(capsys, place):
    code, found = examined(capsys, place, "optimizer.lrr=1", "trainer.max_epoch=1")
    assert code == 2
    assert set(found) == {"optimizer.lrr", "trainer.max_epoch"}
    assert main([place, "optimizer.lrr=1"]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'lr'" in said
    assert "Traceback" not in said
    assert main(["--quik"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_bad(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, found = examined(capsys, f"run_dir={tmp_path}/file/run", "--quick")
    assert code == 1
    assert found["run_dir"][0].state == "red"


def test_a_gpu_that_is_not_there_is_bad(capsys, place):
    if torch.cuda.is_available():
        found = machine.devices([replace(seen(), device="cpu")], "cuda")[0]
    else:
        code, all_found = examined(capsys, place, "launch.device=cuda", "--quick")
        assert code == 1
        found = all_found["devices"][0]
    assert found.state == "red"
    assert "launch.device=cpu" in found.advice


# --- places --------------------------------------------------------------------------------------


class Forgetful(LocalStore):
    """Lets everybody take a key that is taken."""

    def create(self, key, data):
        self.replace(key, data)


class Undying(LocalStore):
    """Refuses to delete."""

    def delete(self, keys):
        raise StoreError("AccessDenied: you may not delete")


def states(findings):
    return [finding.state for finding in findings]


def test_a_store_that_keeps_no_condition_is_told_of(tmp_path):
    assert states(places.rights("x", LocalStore(str(tmp_path)))) == ["green", "green"]
    found = places.rights("x", Forgetful(str(tmp_path)))
    assert states(found) == ["green", "red"]
    assert "second writer" in found[1].found


def test_a_store_without_the_right_to_delete_is_bad(tmp_path):
    (found,) = places.rights("x", Undying(str(tmp_path)))
    assert found.state == "red"
    assert "AccessDenied" in found.found


def test_space_is_compared_with_all_that_is_kept(tmp_path):
    store = LocalStore(str(tmp_path / "not" / "there"))
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert states(places.space("x", store, free // 1000, 3)) == ["green"]
    assert states(places.space("x", store, free // 4, 3)) == ["yellow"]
    assert states(places.space("x", store, free, 3)) == ["red"]
    assert states(places.space("x", store, None, 3)) == ["green"]


def test_a_small_place_is_measured_with_less_and_a_full_one_not_at_all(tmp_path, monkeypatch):
    store = LocalStore(str(tmp_path))
    for free, expected in ((40 << 20, "green"), (3 << 20, "yellow")):
        monkeypatch.setattr(places, "_free_bytes", lambda store, free=free: free)
        assert states(places.speed("x", store)[0])[0] == expected
    assert list(tmp_path.iterdir()) == []


# --- the machine ---------------------------------------------------------------------------------


def seen(**more):
    return replace(machine.look(World())[0], **more)


def test_hosts_with_other_versions_clocks_or_devices_are_told_of():
    here = seen(host="a", time_s=100.0)
    assert machine.versions([here, here]).state == "green"
    other = replace(here, host="b", versions={**here.versions, "torch": "2.12.0"})
    found = machine.versions([here, other])
    assert found.state == "red"
    assert "torch" in found.found
    assert machine.clocks([here, replace(here, time_s=100.5)]).state == "green"
    late = machine.clocks([here, replace(here, host="b", time_s=107.0)])
    assert (late.state, "a is 7.0 s behind b" in late.found) == ("yellow", True)
    mixed = machine.devices([here, replace(here, device="H100, 80 GB")], "auto")
    assert states(mixed) == ["yellow"]
    crowded = machine.devices([replace(here, cores=1)] * 3, "auto")
    assert states(crowded) == ["green", "yellow"]


def test_signals_that_are_blocked_are_bad_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGUSR1)
    assert machine.signals(["SIGUSR1", "SIGTERM"]).state == "green"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        found = machine.signals(["SIGUSR1", "SIGTERM"])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert found.state == "red"
    assert found.found == "SIGUSR1 do not arrive"
    assert signal.getsignal(signal.SIGUSR1) == before


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "copies"), [("adam", 2), ("sgd", 1), ("adamw", 2)])
def test_sizes_are_those_of_a_model_that_has_taken_a_step(optimizer, copies):
    run, _ = compose(["model=mlp", f"optimizer={optimizer}"], "")
    found = sizes(run, 1)
    model = build.build_model(run)
    made = targets.make(run.optimizer, "optimizer", list(model.parameters()))
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    made.step()
    kept = [t for s in made.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim]
    weights = [*model.parameters(), *model.buffers()]
    assert found.weights_bytes == sum(t.nbytes for t in weights)
    assert sum(t.nbytes for t in kept) == copies * found.gradients_bytes
    assert 0 <= found.optimizer_bytes - copies * found.gradients_bytes <= 4 * len(made.state)


class Computes(nn.Module):
    """Looks at its weights while it is made."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3) * float(torch.ones(3).sum()))


def test_a_model_that_needs_memory_has_no_sizes():
    run, _ = compose([], "")
    assert sizes(replace(run, model={"_target_": f"{__name__}.Computes"}), 1) is None


# --- SLURM ---------------------------------------------------------------------------------------

PARTITION = {
    "PartitionName": "p",
    "PreemptMode": "REQUEUE",
    "GraceTime": "30",
    "KillWait": "30 sec",
}


@given(save_s=st.floats(0.1, 1000))
def test_the_grace_time_is_enough_exactly_where_a_save_fits(save_s):
    by_topic = {f.topic: f for f in slurm.judge(PARTITION, save_s)}
    assert (by_topic["grace"].state == "green") == (save_s + 5 <= 60)
    assert by_topic["grace"].found.startswith("60 s between the signal and SIGKILL")


def test_what_slurm_does_to_jobs_is_judged():
    def of(**more):
        return {f.topic: f.state for f in slurm.judge({**PARTITION, **more}, 20.0)}

    assert of() == {"preemption": "green", "grace": "green"}
    assert of(PreemptMode="CANCEL")["preemption"] == "yellow"
    assert of(PreemptMode="SUSPEND,GANG")["preemption"] == "yellow"
    assert of(JobRequeue="0")["requeue"] == "yellow"
    in_job = {"SignalLead": "180", "Requeue": "1"}
    assert of(**in_job) == {
        "preemption": "green", "grace": "green", "signal": "green", "requeue": "green"
    }  # fmt: skip
    assert of(**{**in_job, "SignalLead": "30"})["signal"] == "yellow"
    assert of(**{**in_job, "SignalLead": ""})["signal"] == "yellow"
    assert of(**{**in_job, "Requeue": "0"})["requeue"] == "yellow"
    assert [f.found for f in slurm.judge(None, None)] == ["not here"]
    assert [f.state for f in slurm.judge({}, None)] == ["yellow"]
