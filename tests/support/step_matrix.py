"""Small model under every strategy, precision and extra; its step by hand; its complete state."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product

import torch
from support.savers import a_saver_for
from torch.nn.utils import clip_grad_norm_

from trainer.checkpoint import lineage
from trainer.checkpoint.replicas import Replicas
from trainer.cluster.stop import Stop
from trainer.config import targets
from trainer.config.schema import Parallel, Run, Sample, Trainer
from trainer.core import rng
from trainer.core.state import State
from trainer.data import order
from trainer.storage import open_store
from trainer.task import Classification
from trainer.tracking.several import Silent
from trainer.training import build, loop, parallel, resume
from trainer.training.contents import collect
from trainer.training.step import train_step, warm_up

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EXTRAS = ("accumulate", "clip", "ema")
BATCH, MAX_NORM, DECAY, SEED = 12, 0.05, 0.9, 3
NET = {
    "_target_": "torch.nn.Sequential",
    "_args_": [
        {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 9, "bias": False},
        {"_target_": "torch.nn.BatchNorm1d", "num_features": 9},
        {"_target_": "torch.nn.ReLU"},
        {"_target_": "torch.nn.Dropout", "p": 0.3},
        {"_target_": "torch.nn.Linear", "in_features": 9, "out_features": 3},
    ],
}
"""Model whose steps depend on more than their batch; 9 rows and 3 rows over 2 and 3 ranks."""
LAYER = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 3}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
FUSED = {"_target_": "torch.optim.AdamW", "lr": 0.1, "fused": True}


@dataclass(frozen=True)
class Case:
    """Cell of the matrix."""

    strategy: str
    precision: str = "fp32"
    extras: tuple[str, ...] = ()
    param_dtype: str = "fp32"
    bursts: bool = False
    """Infinite gradient in some steps, from the first rank, for one row of the only layer. The last
    rank stores that row."""
    fused: bool = False
    """Optimizer that receives the infinity flag itself instead of being skipped."""

    @property
    def accumulate(self) -> int:
        return 2 if "accumulate" in self.extras else 1

    def __str__(self) -> str:
        words = [self.strategy, self.precision, *self.extras, "bursts" * self.bursts]
        words += ["fused" * self.fused, f"in {self.param_dtype}" * (self.param_dtype != "fp32")]
        return "-".join(filter(None, words))


class Bursting(Classification):
    """A loss that is infinite, by one class, for the sample that is the first of step 2."""

    def loss(self, model, batch):
        loss, logits = super().loss(model, batch)
        if (batch[0] == dataset()[0][order.permutation(SEED, 0, 43)[BATCH]]).all(1).any():
            loss = loss + (logits[:, -1] * torch.inf).sum()
        return loss, logits


def dataset():
    """Return inputs (43, 6) and labels (43,): three batches and a rest."""
    return build.build_data(configured(Case("single"), 1)).train.tensors


def subsets():
    """Return every subset of the extras."""
    return [extras for count in range(4) for extras in combinations(EXTRAS, count)]


def cases(*strategies, extras=None):
    """Return every cell of these strategies, or only the cells with these extras."""
    return [Case(*cell) for cell in product(strategies, PRECISIONS, extras or subsets())]


def configured(case, max_steps):
    has = case.extras.__contains__
    return Run(
        name="a",
        run_dir="unused",
        seed=SEED,
        sample=Sample(shape=[6], classes=3),
        model=LAYER if case.bursts else NET,
        data={"_target_": "trainer.data.synthetic.Synthetic", "shape": [6], "classes": 3,
              "train_samples": 43, "eval_samples": 5},
        task={"_target_": f"support.step_matrix.{'Bursting' if case.bursts else 'Classification'}"},
        optimizer=FUSED if case.fused else SGD,
        parallel=Parallel(
            strategy=case.strategy, min_parameters=20, param_dtype=case.param_dtype
        ),
        trainer=Trainer(
            max_steps=max_steps, max_epochs=None, global_batch_size=BATCH,
            accumulate=case.accumulate, precision=case.precision,
            clip_norm=MAX_NORM if has("clip") else None, ema_decay=DECAY if has("ema") else None,
            eval_every_epochs=None, on_nonfinite="skip" if case.bursts else "stop",
        ),
    )  # fmt: skip


def a_job(case, world, max_steps=5):
    """Build a job as a run does."""
    run = configured(case, max_steps)
    job = build.build_job(run, world, build.build_data(run), Silent())
    warm_up(job)
    return job


def full_tensors(job, state):
    """Return every tensor of a checkpoint as an unsharded array. Collective.

    Buffers become rank 0's, as before each forward.
    """
    parallel.take_rank0_buffers(job.model, job.world)
    content = collect(job, state)
    tensors = {**content.tensors, **dict(job.model.named_buffers(prefix="model"))}
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().numpy().copy()
        for name, t in tensors.items()
    }


def is_applied(applied):
    """Return whether a step's update was applied."""
    return applied if isinstance(applied, bool) else all(applied)


def steps(world, case, count=3):
    """Take steps as the loop does; return the losses, the updates, and all tensors. Collective."""
    job = a_job(case, world)
    batches = job.data.batches({"epoch": 0, "batch": 0})
    losses, applied = [], []
    for _ in range(count):
        metrics, done = train_step(job, next(batches)[0])
        losses.append(world.mean(metrics["loss"].double()).item())
        applied.append(is_applied(done))
    return losses, applied, full_tensors(job, State())


def steps_by_hand(case, ranks, count=3):
    """Take the same steps on the complete global batch in one process, in plain PyTorch.

    BatchNorm and dropout see each rank's pieces as that rank does; the statistics are rank 0's.
    """
    run = configured(case, count)
    model, (inputs, labels) = build.build_model(run), dataset()
    parameters = list(model.parameters())
    optimizer, task = targets.make(run.optimizer, "", parameters), targets.make(run.task, "")
    scaler = torch.amp.GradScaler("cpu", enabled=case.precision == "fp16")
    averages = [p.detach().clone() for p in parameters]
    seeds = [rng.derive("rank", SEED, 0, rank) for rank in range(ranks)]
    generators = [_with_generators(partial(rng.seed_all, seed))[1] for seed in seeds]
    losses, applied = [], []
    for step in range(count):
        indices = order.permutation(SEED, 0, len(labels))[step * BATCH : (step + 1) * BATCH]
        gradients, means = [], []
        for rank, rank_indices in enumerate(indices.chunk(ranks)):
            rng.restore(generators[rank])
            pieces = [
                (inputs[chunk], labels[chunk]) for chunk in rank_indices.chunk(case.accumulate)
            ]
            statistics = [buffer.clone() for buffer in model.buffers()]
            backward = partial(_backward_by_hand, case, model, task, scaler, pieces)
            mean, generators[rank] = _with_generators(backward)
            for buffer, before in zip(model.buffers(), statistics, strict=True):
                buffer.copy_(buffer if rank == 0 else before)
            means.append(mean.double())
            gradients.append([p.grad for p in parameters])
            optimizer.zero_grad()
        for parameter, *parts in zip(parameters, *gradients, strict=True):
            parameter.grad = sum(parts) / ranks
        losses.append(torch.stack(means).mean().item())
        applied.append(_update_by_hand(case, parameters, optimizer, scaler, averages))
    return losses, applied, _named(case, model, optimizer, averages)


def _with_generators(do):
    """Return the result of `do`, and the generators after it."""
    return do(), rng.capture()


def _backward_by_hand(case, model, task, scaler, pieces):
    dtype, mean = PRECISIONS[case.precision], torch.zeros(())
    for piece in pieces:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss, _ = task.loss(model, piece)
        scaler.scale(loss / len(pieces)).backward()
        mean += loss.detach() / len(pieces)
    return mean


def _update_by_hand(case, parameters, optimizer, scaler, averages):
    finite = all(bool(p.grad.isfinite().all()) for p in parameters)
    if "clip" in case.extras:
        scaler.unscale_(optimizer)
        clip_grad_norm_(parameters, MAX_NORM)
    if finite or scaler.is_enabled():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    if finite:
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - DECAY)
    return finite


def _named(case, model, optimizer, averages):
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for (name, parameter), average in zip(model.named_parameters(), averages, strict=True):
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
        if "ema" in case.extras:
            tensors[f"ema.{name}"] = average
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def train(world, case, folder, max_steps):
    """Start or resume the run in `folder`; train until it is saved at `max_steps`. Collective.

    Returns the job and its state.
    """
    store = open_store(str(folder))
    attempt = world.run_on_rank0(lambda: lineage.begin(store, {"resume": "auto"}))
    job, state = load(world, case, folder, max_steps)
    saver = a_saver_for(store, attempt, world, resumed_step=state.step or None)
    assert loop.train(job, state, saver, Stop(world))
    return job, state


def load(world, case, folder, max_steps=5):
    """Build a job, and load the newest checkpoint in `folder`, if any. Collective."""
    replicas = Replicas(open_store(str(folder)))
    run = replace(configured(case, max_steps), run_dir=str(folder))
    start = world.run_on_rank0(lambda: resume.choose(replicas, run, {}))
    job = a_job(case, world, max_steps)
    if start.manifest is not None:
        rng.seed_all(999)  # the checkpoint alone decides
    return job, world.run_on_all(lambda: resume.load(job, start))


def everything(job, state):
    """Return this rank's complete training state, in a form that compares bit for bit."""
    content = collect(job, state)
    tensors = {
        **content.tensors,
        **content.rank_local,
        **dict(job.model.named_buffers(prefix="model")),
    }
    local = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in tensors.items()}
    values = {name: (t.dtype, t.numpy().tobytes()) for name, t in local.items()}
    return {**values, "objects": repr(content.objects)}
