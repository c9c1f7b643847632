"""Ranks, grace time and end time from SLURM's environment variables."""

import os

import pytest

from trainer.cluster import launch, slurm
from trainer.errors import ConfigError

STEP = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "n[1-2]",
    "MASTER_ADDR": "n1",
}  # fmt: skip
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch):
    variables = {}
    monkeypatch.setattr(os, "environ", variables)
    return variables


def rank_variables(environ, **changes):
    environ.clear()
    environ.update({k: v for k, v in {**STEP, **changes}.items() if v is not None})
    slurm.set_rank_variables()
    return [environ.get(name) for name in RANK]


def test_set_rank_variables_in_step_of_several_tasks_sets_rank(environ):
    assert rank_variables(environ)[:4] == ["3", "4", "1", "2"]
    assert launch.is_rank()


@pytest.mark.parametrize("change", [
    {"SLURM_STEP_ID": None},  # the batch script's own shell
    {"SLURM_NTASKS": "1"},  # srun of one task: it may start ranks itself
])  # fmt: skip
def test_set_rank_variables_outside_step_or_with_one_task_sets_nothing(environ, change):
    assert rank_variables(environ, **change) == [None] * 5
    assert not launch.is_rank()


def test_set_rank_variables_with_nproc_by_hand_sets_nothing(environ):
    environ.update({**STEP, "SLURM_PROCID": "0"})
    slurm.set_rank_variables("2")
    assert not launch.is_rank()
    environ["SLURM_PROCID"] = "1"
    with pytest.raises(ConfigError, match=r"launch\.nproc=2 .* srun started 4 tasks"):
        slurm.set_rank_variables("2")


def test_set_rank_variables_under_torchrun_keeps_its_variables(environ):
    assert rank_variables(environ, RANK="1", WORLD_SIZE="8")[:2] == ["1", "8"]


@pytest.mark.parametrize("layout", ["3,1", "2(x2),1", "2,2(x3)"])
def test_set_rank_variables_with_uneven_nodes_raises_config_error(environ, layout):
    with pytest.raises(ConfigError, match="ntasks-per-node") as caught:
        rank_variables(environ, SLURM_STEP_TASKS_PER_NODE=layout)
    assert layout in str(caught.value)


def test_set_rank_variables_gives_jobs_and_restarts_different_ports(environ):
    ports = {
        rank_variables(environ, SLURM_JOB_ID=str(job), SLURM_RESTART_COUNT=restart)[4]
        for job in range(70_000, 70_500)
        for restart in (None, "1", "2", "3")
    }
    assert len(ports) == 2000
    assert all(1024 < int(port) < 32_768 for port in ports)


def test_set_rank_variables_gives_steps_of_a_job_different_ports(environ):
    ports = {
        rank_variables(environ, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))[4]
        for job in range(70_000, 70_100)
        for step in range(8)
    }
    assert len(ports) == 800
    assert all(1024 < int(port) < 32_768 for port in ports)


def test_set_rank_variables_keeps_configured_port(environ):
    assert rank_variables(environ, MASTER_PORT="123")[4] == "123"


def test_grace_s_prefers_setting_over_batch_script_over_default(environ):
    assert slurm.grace_s(None) == 30.0
    environ["PERDURE_GRACE_S"] = "180"
    assert slurm.grace_s(None) == 180.0
    assert slurm.grace_s(12.5) == 12.5


def test_end_time_s_reads_batch_script_variable(environ):
    assert slurm.end_time_s() is None
    environ["PERDURE_END_TIME"] = "1790000000"
    assert slurm.end_time_s() == 1.79e9
