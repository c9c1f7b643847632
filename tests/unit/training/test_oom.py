"""Out of memory: what is taken for it, and the numbers of the advice."""

import json

import pytest
import torch
from support.loop_jobs import a_job

from trainer.cluster import launch
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Parallel, Run, Trainer
from trainer.core.state import State
from trainer.errors import ConfigError, TrainingError
from trainer.task import Classification
from trainer.training import oom
from trainer.training.evaluation import evaluate
from trainer.training.step import train_step

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 256000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def a_run(strategy="ddp", recompute=False, **trainer):
    given = {"global_batch_size": 96, **trainer}
    parallel = Parallel(strategy=strategy, recompute=recompute)
    return Run(name="a", run_dir="a", trainer=Trainer(**given), parallel=parallel)


def lines(run, world=None, error=CPU):
    found = oom.explain(error, run, world or World())
    assert isinstance(found, TrainingError)
    return str(found).splitlines()


@pytest.mark.parametrize("error", [
    CPU, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 2.00 GiB"), RuntimeError("CUDA error: out of memory"),
])  # fmt: skip
def test_memory_that_is_short_is_known_in_all_its_forms(error):
    first = lines(a_run(), error=error)[0]
    assert first.startswith("out of memory on rank 0: ")
    assert str(error) in first


@pytest.mark.parametrize("error", [
    RuntimeError("shapes do not fit"), ValueError("CUDA error: out of memory"),
    ConfigError("x"), KeyboardInterrupt(),
])  # fmt: skip
def test_other_errors_are_not_taken_for_it(error):
    assert oom.explain(error, a_run(), World()) is None


@pytest.mark.parametrize(("size", "ranks", "accumulate", "advice"), [
    (96, 1, 1, "trainer.accumulate=2: microbatches of 48"),
    (96, 4, 2, "trainer.accumulate=3: microbatches of 8"),  # 24 a rank
    (50, 2, 1, "trainer.accumulate=5: microbatches of 5"),
    (7, 1, 1, "trainer.accumulate=7: microbatches of 1"),
])  # fmt: skip
def test_the_next_division_of_a_rank_s_share_is_named(size, ranks, accumulate, advice):
    world = World(size=ranks, rank=ranks - 1)
    found = lines(a_run(global_batch_size=size, accumulate=accumulate), world)
    assert found[0].startswith(f"out of memory on rank {ranks - 1}: ")
    assert found[1].startswith("  At most ")
    share = size // ranks
    assert found[2].startswith(
        f"  A microbatch is {share // accumulate} samples now: {share} a rank, "
        f"trainer.accumulate={accumulate}"
    )
    assert found[3].strip().startswith(advice)
    assert Trainer(accumulate=int(advice.split("=")[1].split(":")[0])).accumulate > accumulate


def test_only_what_is_not_done_yet_is_advised():
    everything = "\n".join(lines(a_run(), World(size=4)))
    for word in ("trainer.accumulate=", "precision=bf16", "recompute=true", "keeps 1/4 of"):
        assert word in everything
    done = lines(a_run("fsdp", True, precision="bf16", accumulate=24), World(size=4))
    assert done[3:] == ["    a smaller model, or more ranks"]
    larger = lines(a_run("fsdp", True, precision="bf16", accumulate=12, global_batch_size=48),
                   World(size=4))  # fmt: skip
    assert larger[3:] == ["    a smaller model, or more ranks"]


def test_an_evaluation_has_a_batch_of_its_own():
    class Full(Classification):
        def loss(self, model, batch):
            raise torch.OutOfMemoryError("no room")

    job = a_job(task=Full())
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluate(job, State(), Stop(World()))
    found = lines(a_run(), error=caught.value)
    assert found[0].startswith("out of memory on rank 0 in an evaluation: ")
    assert found[-1].strip().startswith("trainer.eval_batch_size=48: it is 96 now")
    found = lines(a_run(eval_batch_size=10), error=caught.value)
    assert found[-1].strip().startswith("trainer.eval_batch_size=5: it is 10 now")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train_step(job, next(job.data.batches(State().cursor))[0])
    assert "in an evaluation" not in lines(a_run(), error=caught.value)[0]


def test_what_the_ranks_agree_on_stays_agreed():
    agreed = RuntimeError(f"rank 1: Traceback (most recent call last):\n  File …\n{CPU}")
    agreed.agreed = True
    found = oom.explain(agreed, a_run(), World())
    assert found.agreed
    assert "Traceback" not in str(found)
    assert not hasattr(oom.explain(CPU, a_run(), World()), "agreed")


def test_one_rank_s_shortage_is_shown_by_the_launcher_without_a_traceback(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    launch.report_crash(TrainingError("out of memory on rank 1"))
    message = json.loads(file.read_text())["message"]
    failure = type("Failure", (), {"message": message, "exitcode": 1})
    assert launch._failure_text(1, failure, tmp_path) == (
        "rank 1 failed; the other ranks were stopped:\nTrainingError: out of memory on rank 1"
    )
