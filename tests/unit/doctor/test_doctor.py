"""The doctor's findings on this machine, and on simulated machines with problems."""

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
from trainer.doctor import data_workers, machine, places, slurm
from trainer.doctor.__main__ import main
from trainer.doctor.finding import Finding, summary, text
from trainer.doctor.model import sizes
from trainer.errors import StoreError
from trainer.storage import LocalStore
from trainer.training import build


def run_doctor(capsys, *arguments):
    """Return the exit code, and {topic: findings}."""
    code = main([*arguments, "--json"])
    by_topic = {}
    for item in json.loads(capsys.readouterr().out)["findings"]:
        finding = Finding(item["topic"], item["state"], item["found"], item["advice"])
        by_topic.setdefault(finding.topic, []).append(finding)
    return code, by_topic


@pytest.fixture
def run_dir(tmp_path):
    return f"run_dir={tmp_path}/run"


def test_doctor_on_this_machine_is_green_and_leaves_no_files(capsys, tmp_path, run_dir):
    code, findings = run_doctor(capsys, run_dir, "launch.device=cpu")
    assert code == 0
    assert {f.state for items in findings.values() for f in items} == {"green"}
    assert {"configuration", "versions", "devices", "signals", "model", "run_dir"} <= set(findings)
    assert "writes" in findings["run_dir"][-1].message
    assert list(tmp_path.iterdir()) == []


def test_text_has_one_line_per_finding_with_advice_below(capsys, run_dir):
    assert main(["--quick", run_dir]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == f"No problem found: {len(lines)} ok, 0 warn, 0 FAIL."
    assert all(line.startswith("ok    ") for line in lines)
    report = text([Finding("a", "green", "fine"), Finding("long one", "red", "broken", "do this")])
    assert report.splitlines() == [
        "ok    a         fine", "FAIL  long one  broken", " " * 16 + "-> do this"
    ]  # fmt: skip
    assert "would fail" in summary([Finding("a", "red", "x")])


def test_doctor_with_invalid_configuration_exits_2_with_every_problem(capsys, run_dir):
    code, findings = run_doctor(capsys, run_dir, "optimizer.lrr=1", "trainer.max_epoch=1")
    assert code == 2
    assert set(findings) == {"optimizer.lrr", "trainer.max_epoch"}
    assert main([run_dir, "optimizer.lrr=1"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'lr'" in error
    assert "Traceback" not in error
    assert main(["--quik"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_unwritable_run_dir_is_red(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, findings = run_doctor(capsys, f"run_dir={tmp_path}/file/run", "--quick")
    assert code == 1
    assert findings["run_dir"][0].state == "red"


def test_missing_gpu_is_red(capsys, run_dir):
    if torch.cuda.is_available():
        findings = machine.check_devices([replace(rank_info(), device="cpu")], "cuda")[0]
    else:
        code, by_topic = run_doctor(capsys, run_dir, "launch.device=cuda", "--quick")
        assert code == 1
        findings = by_topic["devices"][0]
    assert findings.state == "red"
    assert "launch.device=cpu" in findings.advice


# --- places --------------------------------------------------------------------------------------


class Unconditional(LocalStore):
    """Create existing keys again."""

    def create(self, key, data):
        self.replace(key, data)


class Undeletable(LocalStore):
    """Raise on delete."""

    def delete(self, keys):
        raise StoreError("AccessDenied: you may not delete")


def states(findings):
    return [finding.state for finding in findings]


def test_permissions_without_conditional_create_are_red(tmp_path):
    assert states(places.check_permissions("x", LocalStore(str(tmp_path)))) == ["green", "green"]
    findings = places.check_permissions("x", Unconditional(str(tmp_path)))
    assert states(findings) == ["green", "red"]
    assert "second writer" in findings[1].message


def test_permissions_without_delete_are_red(tmp_path):
    (finding,) = places.check_permissions("x", Undeletable(str(tmp_path)))
    assert finding.state == "red"
    assert "AccessDenied" in finding.message


def test_space_compares_free_bytes_with_all_retained_checkpoints(tmp_path):
    store = LocalStore(str(tmp_path / "not" / "there"))
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert states(places.check_space("x", store, free // 1000, 3)) == ["green"]
    assert states(places.check_space("x", store, free // 4, 3)) == ["yellow"]
    assert states(places.check_space("x", store, free, 3)) == ["red"]
    assert states(places.check_space("x", store, None, 3)) == ["green"]


def test_speed_with_little_space_uses_less_data_or_is_yellow(tmp_path, monkeypatch):
    store = LocalStore(str(tmp_path))
    for free, expected in ((40 << 20, "green"), (3 << 20, "yellow")):
        monkeypatch.setattr(places, "_free_bytes", lambda store, free=free: free)
        assert states(places.measure_speed("x", store)[0])[0] == expected
    assert list(tmp_path.iterdir()) == []


# --- the machine ---------------------------------------------------------------------------------


def rank_info(**more):
    return replace(machine.collect(World())[0], **more)


def test_hosts_with_different_versions_clocks_or_devices_are_reported():
    here = rank_info(host="a", time_s=100.0)
    assert machine.check_versions([here, here]).state == "green"
    other = replace(here, host="b", versions={**here.versions, "torch": "2.12.0"})
    findings = machine.check_versions([here, other])
    assert findings.state == "red"
    assert "torch" in findings.message
    assert machine.check_clocks([here, replace(here, time_s=100.5)]).state == "green"
    late = machine.check_clocks([here, replace(here, host="b", time_s=107.0)])
    assert (late.state, "a is 7.0 s behind b" in late.message) == ("yellow", True)
    mixed = machine.check_devices([here, replace(here, device="H100, 80 GB")], "auto")
    assert states(mixed) == ["yellow"]
    crowded = machine.check_devices([replace(here, cores=1)] * 3, "auto")
    assert states(crowded) == ["green", "yellow"]


def test_signals_blocked_are_red_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGUSR1)
    assert machine.check_signals(["SIGUSR1", "SIGTERM"]).state == "green"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        findings = machine.check_signals(["SIGUSR1", "SIGTERM"])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    assert findings.state == "red"
    assert findings.message == "SIGUSR1 do not arrive"
    assert signal.getsignal(signal.SIGUSR1) == before


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "copies"), [("adam", 2), ("sgd", 1), ("adamw", 2)])
def test_sizes_equal_those_of_a_model_after_one_step(optimizer, copies):
    run, _ = compose(["model=mlp", f"optimizer={optimizer}"], "")
    findings = sizes(run, 1)
    model = build.build_model(run)
    updated = targets.make(run.optimizer, "optimizer", list(model.parameters()))
    model(torch.zeros(2, 1, 8, 8)).sum().backward()
    updated.step()
    moments = [
        t for s in updated.state.values() for t in s.values() if torch.is_tensor(t) and t.ndim
    ]
    weights = [*model.parameters(), *model.buffers()]
    assert findings.weights_bytes == sum(t.nbytes for t in weights)
    assert sum(t.nbytes for t in moments) == copies * findings.gradients_bytes
    assert (
        0 <= findings.optimizer_bytes - copies * findings.gradients_bytes <= 4 * len(updated.state)
    )


class Computes(nn.Module):
    """Read the weights in the constructor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3) * float(torch.ones(3).sum()))


def test_sizes_of_a_model_that_computes_in_its_constructor_are_none():
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
def test_grace_is_green_exactly_if_a_save_fits(save_s):
    by_topic = {f.topic: f for f in slurm.check_slurm(PARTITION, save_s)}
    assert (by_topic["grace"].state == "green") == (save_s + 5 <= 60)
    assert by_topic["grace"].message.startswith("60 s between the signal and SIGKILL")


def test_slurm_settings_map_to_states():
    def of(**more):
        return {f.topic: f.state for f in slurm.check_slurm({**PARTITION, **more}, 20.0)}

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
    assert [f.message for f in slurm.check_slurm(None, None)] == ["not installed"]
    assert [f.state for f in slurm.check_slurm({}, None)] == ["yellow"]


def slurm_programs(folder, **outputs):
    """Write programs called scontrol and sacct that print an output for each pattern."""
    for name in ("scontrol", "sacct"):
        lines = [f"{pattern}) printf '%s\\n' '{text}';;" for pattern, text in outputs.items()]
        text = ["#!/bin/sh", 'case "$0 $*" in', *lines, "*) exit 1;;", "esac"]
        (folder / name).write_text("\n".join(text))
        (folder / name).chmod(0o755)


JOB = "JobId=7 Requeue=1 TimeLimit=1-00:00:00 Command=/x"
SUBMITTED = "sbatch --signal=B:USR1@300 train.sbatch"
SCRIPT = "#!/bin/bash\n#SBATCH --requeue --signal=USR2@180\necho --signal=TERM@5"


@pytest.mark.parametrize(("job", "submitted", "variable", "script", "lead"), [
    (JOB, "", "", SCRIPT, "180"),
    (JOB, "", "", "#!/bin/bash\necho --signal=TERM@5", ""),
    (JOB, "", "", "#!/bin/bash\n#SBATCH --signal=USR2", "60"),
    (JOB, "", "USR1@240", SCRIPT, "240"),
    (JOB, SUBMITTED, "USR1@240", SCRIPT, "300"),
    (f"{JOB} Signal=USR2@400", SUBMITTED, "USR1@240", SCRIPT, "400"),
])  # fmt: skip
def test_settings_read_the_lead_and_limit_of_the_present_job(
    tmp_path, monkeypatch, job, submitted, variable, script, lead
):
    outputs = {"*show*job*7": job, "*write*batch_script*": script, "*show*config*": "KillWait = 30"}
    slurm_programs(tmp_path, **outputs, **({"*sacct*7": submitted} if submitted else {}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SBATCH_SIGNAL", variable)
    settings = slurm.settings()
    assert (settings["SignalLead"], settings["TimeLimit"]) == (lead, "1-00:00:00")


def test_scontrol_that_fails_in_a_job_is_reported(tmp_path, monkeypatch):
    slurm_programs(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (finding,) = slurm.check_slurm(slurm.settings(), None)
    assert (finding.state, "does not respond" in finding.message) == ("yellow", True)


@pytest.mark.parametrize(("program", "version"), [
    ("echo 570.1\necho 570.1", "570.1"), ("echo failed; exit 9", "unknown"), ("true", "unknown"),
])  # fmt: skip
def test_driver_version_is_unknown_if_nvidia_smi_fails(tmp_path, monkeypatch, program, version):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine._driver() == version


@pytest.mark.parametrize(("limit", "lead", "state", "text"), [
    ("1-00:00:00", "180", "green", "signaled 180 s before its time limit of 1-00:00:00"),
    ("00:03:00", "180", "yellow", "so at its start"),
    ("00:03:01", "180", "green", "before its time limit of 00:03:01"),
    ("UNLIMITED", "", "green", "no time limit"),
    ("00:03:00", "", "yellow", "no --signal"),
    ("Partition_Limit", "180", "green", "signaled 180 s before its time limit"),
])  # fmt: skip
def test_lead_is_compared_with_the_time_limit(limit, lead, state, text):
    config = {**PARTITION, "SignalLead": lead, "TimeLimit": limit}
    (finding,) = [f for f in slurm.check_slurm(config, 1.0) if f.topic == "signal"]
    assert finding.state == state
    assert text in finding.message


def test_doctor_checks_the_limits_of_data_workers(capsys, run_dir):
    _, without = run_doctor(capsys, run_dir, "--quick")
    assert not {"open files", "shared memory"} & set(without)
    settings = [run_dir, "--quick", "trainer.data_workers=2", "launch.nproc=2", "launch.device=cpu"]
    _, findings = run_doctor(capsys, *settings)
    assert [f.state for f in findings["open files"]] == ["green"]
    assert "4 workers with 2 batches" in findings["shared memory"][0].message


@pytest.mark.parametrize(
    ("memory", "state"),
    [(None, "red"), ((99, 400), "red"), ((100, 400), "yellow"), ((200, 400), "green")],
)
def test_doctor_compares_shared_memory_with_the_batches_of_all_workers(memory, state):
    finding = data_workers.check_shared_memory(memory, workers=10, batch_bytes=10)
    assert finding.state == state
    assert bool(finding.advice) == (state != "green")


def test_doctor_warns_about_few_descriptors():
    finding = data_workers.check_descriptors(256)
    assert finding.state == "yellow"
    assert "ulimit -n" in finding.advice
    assert data_workers.check_descriptors(1024).state == "green"
