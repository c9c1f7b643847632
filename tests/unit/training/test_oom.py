"""Out-of-memory errors: detection and advice."""

import json

import pytest
import torch
from support.loop_jobs import a_job

from trainer.cluster import launch, outcome
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
    parallel = Parallel(strategy=strategy, recompute=recompute)
    settings = Trainer(**{"global_batch_size": 96, **trainer})
    return Run(name="a", run_dir="a", trainer=settings, parallel=parallel)


def lines(run, world=None, error=CPU):
    explained = oom.explain(error, run, world or World())
    assert isinstance(explained, TrainingError)
    return str(explained).splitlines()


@pytest.mark.parametrize("error", [
    CPU, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 2.00 GiB"), RuntimeError("CUDA error: out of memory"),
])  # fmt: skip
def test_explain_recognises_every_out_of_memory_error(error):
    first = lines(a_run(), error=error)[0]
    assert first.startswith("out of memory on rank 0: ")
    assert str(error) in first


@pytest.mark.parametrize("error", [
    RuntimeError("shapes do not fit"), ValueError("CUDA error: out of memory"),
    ConfigError("x"), KeyboardInterrupt(),
])  # fmt: skip
def test_explain_other_errors_returns_none(error):
    assert oom.explain(error, a_run(), World()) is None


@pytest.mark.parametrize(("size", "ranks", "accumulate", "advice"), [
    (96, 1, 1, "trainer.accumulate=2: microbatches of 48"),
    (96, 4, 2, "trainer.accumulate=3: microbatches of 8"),  # 24 per rank
    (50, 2, 1, "trainer.accumulate=5: microbatches of 5"),
    (7, 1, 1, "trainer.accumulate=7: microbatches of 1"),
])  # fmt: skip
def test_advice_names_the_next_divisor_of_the_batch_per_rank(size, ranks, accumulate, advice):
    world = World(size=ranks, rank=ranks - 1)
    explained = lines(a_run(global_batch_size=size, accumulate=accumulate), world)
    assert explained[0].startswith(f"out of memory on rank {ranks - 1}: ")
    assert explained[1].startswith("  Peak use of this rank: ")
    per_rank = size // ranks
    assert explained[2].startswith(
        f"  Microbatch: {per_rank // accumulate} samples ({per_rank} per rank, "
        f"trainer.accumulate={accumulate})"
    )
    assert explained[3].strip().startswith(advice)
    assert Trainer(accumulate=int(advice.split("=")[1].split(":")[0])).accumulate > accumulate


def test_advice_omits_settings_already_in_use():
    everything = "\n".join(lines(a_run(), World(size=4)))
    for word in ("trainer.accumulate=", "precision=bf16", "recompute=true", "keeps 1/4 of"):
        assert word in everything
    done = lines(a_run("fsdp", True, precision="bf16", accumulate=24), World(size=4))
    assert done[3:] == ["    a smaller model, or more ranks"]
    larger = lines(a_run("fsdp", True, precision="bf16", accumulate=12, global_batch_size=48),
                   World(size=4))  # fmt: skip
    assert larger[3:] == ["    a smaller model, or more ranks"]


def test_advice_in_an_evaluation_names_eval_batch_size():
    class Full(Classification):
        def loss(self, model, batch):
            raise torch.OutOfMemoryError("no room")

    job = a_job(task=Full())
    with pytest.raises(torch.OutOfMemoryError) as caught:
        evaluate(job, State(), Stop(World()))
    explained = lines(a_run(), error=caught.value)
    assert explained[0].startswith("out of memory on rank 0 in an evaluation: ")
    assert explained[-1].strip().startswith("trainer.eval_batch_size=48: it is 96 now")
    explained = lines(a_run(eval_batch_size=10), error=caught.value)
    assert explained[-1].strip().startswith("trainer.eval_batch_size=5: it is 10 now")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train_step(job, next(job.data.batches(State().cursor))[0])
    assert "in an evaluation" not in lines(a_run(), error=caught.value)[0]


def test_explain_keeps_the_agreed_flag():
    agreed = RuntimeError(f"rank 1: Traceback (most recent call last):\n  File …\n{CPU}")
    agreed.agreed = True
    explained = oom.explain(agreed, a_run(), World())
    assert explained.agreed
    assert "Traceback" not in str(explained)
    assert not hasattr(oom.explain(CPU, a_run(), World()), "agreed")


def test_launcher_shows_out_of_memory_without_a_traceback(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    outcome.report_crash(TrainingError("out of memory on rank 1"))
    message = json.loads(file.read_text())["message"]
    failure = type("Failure", (), {"message": message, "exitcode": 1})
    assert launch._failure_text(1, failure, tmp_path) == (
        "rank 1 failed; the other ranks were stopped:\nerror: out of memory on rank 1"
    )
