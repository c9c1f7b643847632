"""Phases on several ranks: each update equals the large batch's, and a resume is exact."""

from dataclasses import replace

import numpy as np
import pytest

from trainer.config.schema import Parallel


def pair_job(world, options=None, accumulate=1):
    """Build a job of two nets without BatchNorm, with unequal sample weights.

    The noise comes with the batch, so that all ranks have the same. Both phases call both nets.
    """
    import torch
    from support.gan_jobs import phased
    from support.weighted_jobs import dataset, masked_job
    from torch import nn

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 6)).double()
            self.b = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    class Duel:
        phases = {"two": ["b.*"], "one": "a.*"}  # noqa: RUF012

        def loss(self, model, batch, phase):
            real, noise, mask = batch
            weight = mask.sum(1)
            if phase == "two":
                with torch.no_grad():
                    fake = model.a(noise)
                margin = model.b(fake) - model.b(real)  # one net twice in a forward
            else:
                margin = -model.b(model.a(noise))
            loss = nn.functional.softplus(margin).squeeze(1) * weight
            return loss.sum() / weight.sum().clamp(min=1), margin

        def weight(self, batch):
            return batch[2].sum()

        def train_metrics(self, outputs, batch, phase):
            return {}

        def metrics(self):
            return {}

        def update(self, metrics, outputs, batch, phase):
            pass

    job = masked_job(dataset(), accumulate, world)
    torch.manual_seed(0)
    job = replace(job, model=Pair(), task=Duel())
    return phased(job, options, stated=Duel.phases, make=lambda phase, params: (
        torch.optim.SGD(params, lr={"one": 0.3, "two": 0.1}[phase], momentum=0.9)
    ))  # fmt: skip


def steps(world, options, accumulate, clip_norm):
    """Train three steps; return the means of the ranks' losses, and the weights."""
    from trainer.training import parallel
    from trainer.training.step import train_step, warm_up

    job = pair_job(world, options, accumulate)
    job.clip_norm = clip_norm
    warm_up(job)
    batches, losses = job.data.batches({"epoch": 0, "batch": 0}), []
    for _ in range(3):
        metrics, _ = train_step(job, next(batches)[0])
        losses += [world.mean(metrics[name]).item() for name in ("loss", "one_loss", "two_loss")]
    parallel.reshard(job.phases[0].wrapped)
    tensors = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in job.model.parameters()]
    return losses, [p.detach().numpy().copy() for p in tensors]


def runs(world, folder, options):
    """Train with and without a stop; return differing tensors, and whether objects are equal."""
    import torch
    from support.gan_jobs import gan_job, images, phased
    from support.loop_jobs import saved_steps
    from support.savers import a_saver_for

    from trainer.checkpoint import lineage
    from trainer.checkpoint.replicas import Replicas
    from trainer.checkpoint.retention import Retention
    from trainer.cluster.stop import Stop
    from trainer.config.schema import Run
    from trainer.core import rng
    from trainer.core.intervals import Every
    from trainer.data.source import EvalStream, TrainStream
    from trainer.storage import open_store
    from trainer.training import loop, resume, sample_outputs
    from trainer.training.contents import collect
    from trainer.training.ema import Ema
    from trainer.training.step import warm_up

    measures = options.strategy == "fsdp"  # with other strategies, evaluation is as without phases

    def go_on(name, max_steps):
        store = open_store(f"{folder}/{name}")
        job = gan_job(clip_norm=0.5, max_steps=max_steps, eval_every=Every(steps=4))
        job.world = world
        job.data = TrainStream(images(), world, 5, 12, 2)
        job.evaluation = EvalStream(images(7), world, 2) if measures else None
        phased(job, options, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 2))
        job.ema = Ema(job.model, 0.9, job.phases[0].wrapped)
        rng.seed_all(world.rank)
        warm_up(job)
        run = Run(name="a", run_dir=f"{folder}/{name}")
        start = world.run_on_rank0(lambda: resume.choose(Replicas(store), run, {}))
        state = resume.load(job, start)
        attempt = world.run_on_rank0(lambda: lineage.begin(store, {"resume": "auto"}))
        origin = {"step": start.step, "attempt": None}
        world.run_on_rank0(lambda: lineage.amend(store, attempt, {"resumed_from": origin}))
        retention = Retention(store, attempt, keep_last=9)
        saver = a_saver_for(store, attempt, world, retention=retention)
        assert loop.train(job, state, saver, Stop(world))
        assert measures == ("generator_loss" in state.metrics)
        if measures:  # sampling calls parts of a sharded model
            messages = sample_outputs.show(job, state.step, store)
            assert "no samples" not in "".join(messages)
            assert world.run_on_rank0(lambda: store.read("samples/images.png"))[1:4] == b"PNG"
        content = collect(job, state)
        tensors = {
            name: (t.to_local() if hasattr(t, "to_local") else t).detach().numpy().tobytes()
            for name, t in {**content.tensors, **content.rank_local}.items()
        }
        return tensors, repr(content.objects)

    reference = go_on("uninterrupted", 8)
    go_on("halves", 4)
    halves = go_on("halves", 8)
    assert saved_steps(f"{folder}/halves") == [4, 8]
    differences = [name for name in reference[0] if reference[0][name] != halves[0][name]]
    return differences, reference[1] == halves[1]


def both(world, folder, strategies):
    """Return all results of one launch of the ranks, whose startup takes most of the time."""

    options = {
        "ddp": Parallel(bucket_cap_mb=0.0005),
        "static": Parallel(static_graph=True, gradient_as_bucket_view=False),
        "fsdp": Parallel(strategy="fsdp", min_parameters=30),
    }
    answers = {}
    for name in strategies:
        results = [steps(world, options[name], 1, None), steps(world, options[name], 2, 0.05)]
        answers[name] = results, runs(world, f"{folder}/{name}", options[name])
    return answers


@pytest.mark.parametrize(
    ("size", "strategies"),
    [
        (3, ["ddp"]),
        pytest.param(3, ["static", "fsdp"], marks=pytest.mark.slow),
        pytest.param(2, ["ddp", "static", "fsdp"], marks=pytest.mark.slow),
    ],
)
def test_phase_steps_equal_single_process_steps_and_resume_is_exact(
    on_ranks, tmp_path, size, strategies
):
    from trainer.cluster.world import World

    expected = [steps(World(), None, 1, clip_norm) for clip_norm in (None, 0.05)]
    for answers in on_ranks(size, both, str(tmp_path), strategies):
        assert list(answers) == strategies
        for name, (results, comparison) in answers.items():
            for (rank_losses, rank_weights), (losses, weights) in zip(
                results, expected, strict=True
            ):
                np.testing.assert_allclose(rank_losses, losses, rtol=1e-6, err_msg=name)
                for rank_array, array in zip(rank_weights, weights, strict=True):
                    np.testing.assert_allclose(
                        rank_array, array, rtol=1e-6, atol=1e-9, err_msg=name
                    )
            assert comparison == ([], True), name
