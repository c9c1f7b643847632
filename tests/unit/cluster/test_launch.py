"""How ranks are found in the environment, and how an outcome is left."""

import os
import subprocess
import sys

import pytest

from trainer.cluster import launch
from trainer.errors import DONE, FAILURE, RUN_AGAIN, ConfigError, StoreError

STEP = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]",
    "MASTER_ADDR": "n1",
}  # fmt: skip
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch):
    made = {}
    monkeypatch.setattr(launch.os, "environ", made)
    return made


def taken(environ, **more):
    environ.clear()
    environ.update({k: v for k, v in {**STEP, **more}.items() if v is not None})
    launch.take_rank_from_slurm()
    return [environ.get(name) for name in RANK]


def test_the_tasks_of_a_step_are_ranks(environ):
    assert taken(environ)[:4] == ["3", "4", "1", "2"]
    assert launch.is_rank()


@pytest.mark.parametrize("change", [
    {"SLURM_STEP_ID": None},  # the batch script's own shell
    {"SLURM_NTASKS": "1"},  # srun of one task: it may start ranks itself
])  # fmt: skip
def test_what_is_no_task_of_several_is_no_rank(environ, change):
    assert taken(environ, **change) == [None] * 5
    assert not launch.is_rank()


def test_torchrun_inside_of_a_step_decides(environ):
    assert taken(environ, RANK="1", WORLD_SIZE="8")[:2] == ["1", "8"]


@pytest.mark.parametrize("layout", ["3,1", "2(x2),1", "2,2(x3)"])
def test_nodes_with_different_numbers_of_tasks_are_refused(environ, layout):
    with pytest.raises(ConfigError, match="ntasks-per-node") as caught:
        taken(environ, SLURM_STEP_TASKS_PER_NODE=layout)
    assert layout in str(caught.value)


def test_jobs_of_one_node_and_their_restarts_have_ports_of_their_own(environ):
    ports = {
        taken(environ, SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=restart)[4]
        for job in range(70_000, 70_500)
        for restart in (None, "1", "2", "3")
    }
    assert len(ports) == 2000
    assert all(1024 < int(port) < 32_768 for port in ports)


def test_a_port_that_is_set_stays(environ):
    assert taken(environ, MASTER_PORT="123")[4] == "123"


@pytest.mark.parametrize(("environment", "codes"), [
    ({}, (0, 1, 2, 75, 76)),
    ({"PERDURE_OUTCOME": "f"}, (0, 1, 2, 75, 76)),  # srun passes codes on
    ({"TORCHELASTIC_RUN_ID": "x"}, (0, 1, 2, 0, 76)),  # an agent would start it again
    ({"TORCHELASTIC_RUN_ID": "x", "PERDURE_OUTCOME": "f"}, (0, 0, 0, 0, 0)),
])  # fmt: skip
def test_a_rank_exits_with_what_its_starter_understands(environ, environment, codes):
    environ.update(environment)
    assert tuple(launch.rank_exit_code(code) for code in (0, 1, 2, 75, 76)) == codes


def test_an_outcome_is_left_and_forgotten(environ, tmp_path):
    launch.leave_outcome(RUN_AGAIN)  # nobody asks for it
    environ["PERDURE_OUTCOME"] = str(tmp_path / "outcome")
    launch.forget_outcome()
    for code in (FAILURE, RUN_AGAIN, DONE):
        launch.leave_outcome(code)
        assert (tmp_path / "outcome").read_text() == str(code)
    launch.forget_outcome()
    assert list(tmp_path.iterdir()) == []


def test_the_grace_time_is_the_settings_or_the_batch_scripts_or_thirty_seconds(environ):
    assert launch.grace_s(None) == 30.0
    environ["PERDURE_GRACE_S"] = "180"
    assert launch.grace_s(None) == 180.0
    assert launch.grace_s(12.5) == 12.5


def test_the_end_of_the_job_is_known_where_the_batch_script_knows_it(environ):
    assert launch.end_time_s() is None
    environ["PERDURE_END_TIME"] = "1790000000"
    assert launch.end_time_s() == 1.79e9


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError("a bug"), 1), (ConfigError("no"), 2), (StoreError("no"), 75),
])  # fmt: skip
def test_a_rank_that_fails_alone_leaves_its_own_code(environ, tmp_path, capsys, error, code):
    environ["PERDURE_OUTCOME"] = str(tmp_path / "outcome")
    if code != RUN_AGAIN:
        launch.leave_outcome(RUN_AGAIN)  # a peer was faster, and took it for lost
    assert launch.report_crash(error) == code
    assert (tmp_path / "outcome").read_text() == str(code)
    assert str(error) in capsys.readouterr().err


def test_a_failure_is_not_overruled_by_who_would_run_again(environ, tmp_path):
    environ["PERDURE_OUTCOME"] = str(tmp_path / "outcome")
    launch.report_crash(RuntimeError("a bug"))
    assert launch.report_crash(StoreError("a disk")) == RUN_AGAIN
    assert (tmp_path / "outcome").read_text() == str(FAILURE)


@pytest.mark.parametrize(("first", "second", "stays"), [(1, 75, "1"), (2, 1, "2"), (75, 75, "75")])
def test_who_leaves_because_of_a_peer_does_not_overrule_the_peer(tmp_path, first, second, stays):
    for code in (first, second):
        left = subprocess.run(
            [
                sys.executable,
                "-c",
                f"from trainer.cluster.launch import leave_at_once as l; l({code})",
            ],
            env={**os.environ, "PERDURE_OUTCOME": str(tmp_path / "outcome")},
        )
        assert left.returncode == code
    assert (tmp_path / "outcome").read_text() == stays
