"""The loop against loops written by hand, without Hydra, in one process."""

import math
import signal
import time
from itertools import islice, pairwise

import pytest
import torch
from support.loop_jobs import (
    BATCH,
    BEGINNING,
    DATA,
    PER_EPOCH,
    Lines,
    Net,
    a_job,
    a_saver,
    everything,
    go_on,
    saved_steps,
    sgd,
    without_times,
)
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from trainer import schedule
from trainer.checkpoint import lineage
from trainer.checkpoint.replicas import Replicas
from trainer.checkpoint.saver import Saver
from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.schema import Run, Trainer
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.data.fingerprint import fingerprint
from trainer.data.source import EvalStream, TrainStream
from trainer.data.synthetic import Synthetic
from trainer.errors import CheckpointError, ConfigError, StoreError
from trainer.storage import LocalStore, open_store
from trainer.task import Classification
from trainer.training import boundary, loop, resume
from trainer.training.contents import collect
from trainer.training.evaluation import evaluate
from trainer.training.step import train_step, warm_up


class Meddling(Classification):
    """Does something at a given call in training, or in evaluation."""

    def __init__(self, do, *, training=None, evaluation=None):
        super().__init__()
        self.do, self.remaining = do, {True: training, False: evaluation}

    def loss(self, model, batch):
        remaining = self.remaining[model.training]
        self.remaining[model.training] = None if remaining is None else remaining - 1
        loss, outputs = super().loss(model, batch)
        return (self.do(loss) if remaining == 1 else loss), outputs


class FailsAtFirst(LocalStore):
    """A disk on which the first few shards cannot be written."""

    failures = 0

    def write(self, key, total_bytes, parts):
        if self.failures:
            self.failures -= 1
            raise StoreError("no space left")
        super().write(key, total_bytes, parts)


class Killed(Exception):
    pass


def killed(loss):
    raise Killed


def raised(loss):
    signal.raise_signal(signal.SIGUSR1)
    return loss


def infinite(loss):
    return loss * math.inf


pytestmark = pytest.mark.usefixtures("one_thread")


# --- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    sgd,
    lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
])  # fmt: skip
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_every_update_is_bit_equal_to_a_loop_written_by_hand(make, clip_norm):
    job = a_job(optimizer=make, clip_norm=clip_norm)
    by_hand = Net()
    by_hand.load_state_dict(job.model.state_dict())
    optimizer = make(by_hand)
    rng.seed_all(7)
    with_ours = rng.capture()
    for microbatches, _ in islice(job.data.batches(BEGINNING), 7):
        rng.restore(with_ours)
        train_step(job, microbatches)
        after = rng.capture()
        rng.restore(with_ours)
        inputs, labels = microbatches[0]
        optimizer.zero_grad()
        F.cross_entropy(by_hand(inputs), labels).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(by_hand.parameters(), clip_norm)
        optimizer.step()
        with_ours = after
        for actual, reference in zip(job.model.state_dict().values(), by_hand.state_dict().values(),
                                strict=True):  # fmt: skip
            assert torch.equal(actual, reference)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_microbatches_are_one_large_batch(accumulate):
    def plain():
        torch.manual_seed(3)
        return nn.Linear(6, 3).double()

    dataset = Synthetic((6,), classes=3, train_samples=43)
    for part in (dataset.train, dataset.eval):
        part.tensors = (part.tensors[0].double(), part.tensors[1])
    large = a_job(model=plain(), dataset=dataset)
    small = a_job(model=plain(), dataset=dataset, accumulate=accumulate)
    both = zip(large.data.batches(BEGINNING), small.data.batches(BEGINNING), strict=True)
    for (one, _), (several, _) in islice(both, 6):
        assert (len(one), len(several)) == (1, accumulate)
        expected, _ = train_step(large, one, with_metrics=True)
        result, _ = train_step(small, several, with_metrics=True)
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)  # metrics are float32
        for actual, reference in zip(
            small.model.parameters(), large.model.parameters(), strict=True
        ):
            torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-14)


def test_figures_are_the_loss_the_tasks_own_and_the_norm_before_clipping():
    job = a_job(clip_norm=1e-3)
    microbatches, _ = next(job.data.batches(BEGINNING))
    twin = Net()
    twin.load_state_dict(job.model.state_dict())
    inputs, labels = microbatches[0]
    rng.seed_all(7)
    outputs = twin(inputs)
    loss = F.cross_entropy(outputs, labels)
    loss.backward()
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in twin.parameters()))
    rng.seed_all(7)
    metrics, applied = train_step(job, microbatches, with_metrics=True)
    assert applied
    assert list(metrics) == ["loss", "accuracy", "grad_norm"]
    assert metrics["loss"].item() == loss.item()
    assert metrics["accuracy"].item() == (outputs.argmax(1) == labels).float().mean().item()
    assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-5)


def test_without_figures_nothing_is_computed_for_them_and_no_gradient_is_left():
    job = a_job()
    microbatches, _ = next(job.data.batches(BEGINNING))
    metrics, _ = train_step(job, microbatches)
    assert set(metrics) == {"loss"}  # checked before the next save
    assert all(parameter.grad is None for parameter in job.model.parameters())


def test_half_precision_forward_leaves_parameters_in_full_precision():
    seen = []

    class Looks(Classification):
        def loss(self, model, batch):
            loss, outputs = super().loss(model, batch)
            seen.append(outputs.dtype)
            return loss, outputs

    job = a_job(precision="bf16", task=Looks(), max_steps=2)
    state = State()
    evaluate(job, state, Stop(World()))
    microbatches, _ = next(job.data.batches(BEGINNING))
    train_step(job, microbatches)
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}


# --- evaluation --------------------------------------------------------------------------------


def by_hand(model):
    """Return loss and accuracy over all evaluation samples at once."""
    inputs, labels = DATA.eval.tensors
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
    model.train()
    accuracy = (outputs.argmax(1) == labels).double().mean().item()
    return {"loss": F.cross_entropy(outputs, labels).item(), "accuracy": accuracy}


@pytest.mark.parametrize("batch_size", [1, 5, 7, 23, 100])
def test_evaluate_is_the_mean_over_samples_for_any_batch_size(batch_size):
    job = a_job(evaluation=EvalStream(DATA.eval, World(), batch_size))
    train_step(job, next(job.data.batches(BEGINNING))[0])
    metrics = evaluate(job, State(), Stop(World()))
    assert metrics == pytest.approx(by_hand(job.model), rel=1e-6)
    again = evaluate(job, State(), Stop(World()))
    assert again == metrics  # metrics are reset each time


BATCHES = {
    "mapping": lambda x, y: {"x": x, "y": y},
    "number first": lambda x, y: {"longest": 28, "x": x, "y": y},
    "other length first": lambda x, y: {"edges": torch.zeros(2, 3), "x": x, "y": y},
    "list of images": lambda x, y: {"images": list(x), "x": x, "y": y},
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_evaluation_batches_of_any_structure_are_weighted_by_their_samples(make):
    class Structured:
        def __len__(self):
            return 23

        def __getitems__(self, indices):
            inputs, labels = DATA.eval.tensors
            return make(inputs[indices], labels[indices])

    class OfStructures(Classification):
        def loss(self, model, batch):
            return super().loss(model, (batch["x"], batch["y"]))

        def update(self, metrics, outputs, batch):
            super().update(metrics, outputs, (batch["x"], batch["y"]))

    job = a_job(task=OfStructures(), evaluation=EvalStream(Structured(), World(), 5))
    metrics = evaluate(job, State(), Stop(World()))
    assert metrics == pytest.approx(by_hand(job.model), rel=1e-6)


def test_evaluation_loss_is_nan_if_one_batch_is_and_ignores_batches_without_items():
    class Masked(Classification):
        """Only labels from `first` on are items; a mean over zero items is NaN."""

        first = 0

        def loss(self, model, batch):
            inputs, labels = batch
            outputs = model(inputs)
            is_item = labels >= self.first
            return F.cross_entropy(outputs[is_item], labels[is_item]), outputs

        def weight(self, batch):
            return (batch[1] >= self.first).sum()

    labels = DATA.eval.tensors[1]
    ordered = TensorDataset(*(tensor[labels.argsort()] for tensor in DATA.eval.tensors))
    task = Masked()
    task.first = int(ordered.tensors[1][9])
    job = a_job(task=task, evaluation=EvalStream(ordered, World(), 5))
    is_item = labels >= task.first
    with torch.no_grad():
        outputs = job.model.eval()(DATA.eval.tensors[0][is_item])
    expected = F.cross_entropy(outputs, labels[is_item]).item()
    assert task.first > labels.min()
    assert evaluate(job, State(), Stop(World()))["loss"] == pytest.approx(expected, rel=1e-6)
    ordered.tensors[0][-1] = math.nan
    assert math.isnan(evaluate(job, State(), Stop(World()))["loss"])


def test_evaluate_leaves_generators_and_mode_unchanged():
    class Random(Classification):
        def loss(self, model, batch):
            torch.rand(3)  # a task may draw random numbers
            return super().loss(model, batch)

    job = a_job(task=Random())
    train_step(job, next(job.data.batches(BEGINNING))[0])
    before = everything(job, State())
    evaluate(job, State(), Stop(World()))
    assert everything(job, State()) == before
    assert job.model.training


def test_evaluate_restores_mode_and_generators_after_an_error():
    job = a_job(task=Meddling(killed, evaluation=2))
    job.model.train()
    before = everything(job, State())
    with pytest.raises(Killed):
        evaluate(job, State(), Stop(World()))
    assert everything(job, State()) == before
    assert job.model.training


def test_evaluate_stopped_returns_no_metrics():
    stop = Stop(World())
    stop.listen(["SIGUSR1"])
    try:
        job = a_job(task=Meddling(raised, evaluation=2))
        before = everything(job, State())
        assert evaluate(job, State(), stop) is None
    finally:
        stop.restore_handlers()
    assert everything(job, State()) == before


# --- a complete run ----------------------------------------------------------------------------


def test_train_matches_a_hand_written_loop(tmp_path):
    job = a_job(log_every_steps=5)
    finished = loop.train(job, state := State(), a_saver(tmp_path), Stop(World()))
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    rng.seed_all(7)
    model.train()
    inputs, labels = DATA.train.tensors
    for step in range(12):
        epoch, batch = divmod(step, PER_EPOCH)
        order = torch.Generator().manual_seed(rng.derive("order", 5, epoch))
        indices = torch.randperm(43, generator=order)[batch * BATCH : (batch + 1) * BATCH]
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[indices]), labels[indices]).backward()
        optimizer.step()
    assert finished
    for actual, reference in zip(job.model.state_dict().values(), model.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(actual, reference)
    assert (state.step, state.epoch, state.samples, state.skipped) == (12, 2, 96, 0)
    assert state.cursor == {"epoch": 2, "batch": 2}


def test_train_is_independent_of_logging_and_evaluation_intervals(tmp_path):
    results = []
    for index, settings in enumerate([
        {"eval_every": Every(), "evaluation": None, "log_every_steps": 99},
        {"eval_every": Every(steps=1)},
        {"eval_every": Every(epochs=1), "evaluation": EvalStream(DATA.eval, World(), 3)},
    ]):  # fmt: skip
        job = a_job(**settings)
        saver = a_saver(tmp_path / str(index), every=Every(steps=index or None))
        loop.train(job, State(), saver, Stop(World()))
        job.evaluation = None  # a checkpoint has the number of its samples
        results.append(everything(job, State()))
    assert results[0] == results[1] == results[2]


def test_lines_come_when_they_should_and_say_where_they_are(tmp_path):
    job = a_job(log_every_steps=5, eval_every=Every(steps=4, epochs=1), clip_norm=1.0,
                schedule=lambda o: lr_scheduler.StepLR(o, 5))  # fmt: skip
    loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    lines = job.tracker.lines
    assert [(line["step"], line["split"]) for line in lines] == [
        (4, "eval"), (5, "train"), (5, "eval"), (8, "eval"), (10, "train"), (10, "eval"),
        (12, "train"), (12, "eval"),
    ]  # fmt: skip
    assert [(line["epoch"], line["samples"]) for line in lines[:2]] == [(0, 32), (1, 40)]
    assert [line["lr"] for line in job.tracker.of("train")] == pytest.approx([0.1, 0.01, 0.001])
    assert list(lines[1]) == [
        "step", "epoch", "samples", "time", "split", "loss", "accuracy", "grad_norm", "lr",
        "samples_per_s", "step_p50_s", "step_p95_s", "step_max_s", "data_wait_s", "save_stall_s",
    ]  # fmt: skip
    assert list(lines[0]) == [
        "step", "epoch", "samples", "time", "split", "loss", "accuracy", "eval_s",
    ]  # fmt: skip
    measured = lines[-1]
    assert {k: measured[k] for k in ("loss", "accuracy")} == pytest.approx(by_hand(job.model))


@pytest.mark.parametrize(("every", "steps"), [
    (Every(), [12]), (Every(steps=5), [5, 10, 12]), (Every(epochs=1), [5, 10, 12]),
    (Every(epochs=2), [10, 12]), (Every(steps=6), [6, 12]), (Every(steps=4, epochs=1),
                                                            [4, 5, 8, 10, 12]),
])  # fmt: skip
def test_checkpoints_come_when_they_should_and_always_at_the_end(tmp_path, every, steps):
    loop.train(a_job(), State(), a_saver(tmp_path, every=every), Stop(World()))
    assert saved_steps(tmp_path) == steps


def test_train_saves_by_the_clock_at_any_step(tmp_path):
    state = State()
    saver = a_saver(tmp_path, every_s=4.0, clock=lambda: float(state.step))  # a second a step
    loop.train(a_job(), state, saver, Stop(World()))
    assert saved_steps(tmp_path) == [5, 10, 12]  # asked before a step, saved after it


def test_train_retries_the_last_save(tmp_path):
    store, messages = FailsAtFirst(tmp_path), []
    store.failures = 2
    saver = a_saver(tmp_path, store=store, log=messages.append)
    assert loop.train(a_job(), State(), saver, Stop(World()))
    assert saved_steps(tmp_path) == [12]
    assert ["saving step 12 failed" in text for text in messages] == [True, True]
    store.failures = 3
    saver = a_saver(tmp_path / "other", store=store, log=messages.append)
    with pytest.raises(StoreError, match="no space left"):
        loop.train(a_job(), State(), saver, Stop(World()))


SCHEDULES = {
    "none": {},
    "per_step": {"schedule": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=13)},
    "per_epoch": {
        "schedule": lambda o: lr_scheduler.MultiStepLR(o, [1, 2]), "scheduler_interval": "epoch",
    },
    "plateau": {
        "schedule": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
        "eval_every": Every(steps=3),
    },
}  # fmt: skip


@pytest.mark.parametrize("dies_in", [1, 4, 6, 8, 12])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_train_killed_at_any_step_ends_with_the_same_bits(tmp_path, dies_in, schedule):
    def job(**changes):
        settings = {"eval_every": Every(epochs=1), **SCHEDULES[schedule], "metric": "accuracy"}
        return a_job(**{**settings, **changes})

    undisturbed, state = job(), State()
    loop.train(undisturbed, state, a_saver(tmp_path / "a"), Stop(World()))
    broken = job(task=Meddling(killed, training=dies_in))
    with pytest.raises(Killed):
        loop.train(broken, State(), a_saver(tmp_path / "b", every=Every(steps=3)), Stop(World()))
    again = job()
    its_state, finished = go_on(tmp_path / "b", again)
    assert finished
    assert everything(again, its_state) == everything(undisturbed, state)
    last_saved = (dies_in - 1) // 3 * 3
    before = [line for line in broken.tracker.lines if line["step"] <= last_saved]
    assert without_times(before + again.tracker.lines) == without_times(undisturbed.tracker.lines)


@pytest.mark.parametrize("stops_in", [1, 5, 12])
def test_train_stopped_by_a_signal_ends_with_the_same_bits(tmp_path, stops_in):
    undisturbed, state = a_job(), State()
    loop.train(undisturbed, state, a_saver(tmp_path / "a"), Stop(World()))
    stop = Stop(World())
    stop.listen(["SIGUSR1"])
    try:
        stopped = a_job(task=Meddling(raised, training=stops_in))
        finished = loop.train(stopped, its_state := State(), a_saver(tmp_path / "b"), stop)
    finally:
        stop.restore_handlers()
    assert its_state.step == stops_in  # the step in hand is completed
    assert saved_steps(tmp_path / "b") == [stops_in]
    assert not finished
    again = a_job()
    its_state, finished = go_on(tmp_path / "b", again)
    assert finished
    assert everything(again, its_state) == everything(undisturbed, state)
    lines = stopped.tracker.lines + again.tracker.lines
    assert without_times(lines) == without_times(undisturbed.tracker.lines)


def test_train_signal_before_the_first_step_saves_step_0(tmp_path):
    stop = Stop(World())
    stop.listen(["SIGUSR1"])
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert not loop.train(a_job(), State(), a_saver(tmp_path), stop)
    finally:
        stop.restore_handlers()
    assert saved_steps(tmp_path) == [0]
    undisturbed, state = a_job(), State()
    loop.train(undisturbed, state, a_saver(tmp_path / "undisturbed"), Stop(World()))
    again = a_job()
    its_state, _ = go_on(tmp_path, again)
    assert everything(again, its_state) == everything(undisturbed, state)


@pytest.mark.parametrize("evaluation", [1, 7, 11])  # batches: 5 at step 4, 8 and 12
def test_train_repeats_an_interrupted_evaluation_on_resume(tmp_path, evaluation):
    settings = {"eval_every": Every(steps=4), "metric": "loss", "metric_mode": "min"}
    undisturbed, state = a_job(**settings), State()
    loop.train(undisturbed, state, a_saver(tmp_path / "a"), Stop(World()))
    stop = Stop(World())
    stop.listen(["SIGUSR1"])
    try:
        stopped = a_job(task=Meddling(raised, evaluation=evaluation), **settings)
        assert not loop.train(stopped, State(), a_saver(tmp_path / "b"), stop)
    finally:
        stop.restore_handlers()
    run = Run(name="a", run_dir=str(tmp_path / "b"), trainer=Trainer(max_steps=12))
    store = open_store(run.run_dir)
    assert not resume.finished(run, resume.choose(Replicas(store), run, {}))
    again = a_job(**settings)
    its_state, finished = go_on(tmp_path / "b", again)
    assert finished
    lines = stopped.tracker.lines + again.tracker.lines
    assert without_times(lines) == without_times(undisturbed.tracker.lines)
    assert its_state == state
    newest = resume.choose(Replicas(store), run, {})
    assert newest.manifest.objects["run"] == state.state_dict()
    assert resume.finished(run, newest)


# --- steps that are saved exactly ---------------------------------------------------------------


class SlowStore(LocalStore):
    """A store whose commits take several steps."""

    def create(self, key, data):
        time.sleep(0.03)
        super().create(key, data)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_train_saves_milestones_epochs_and_best_at_their_own_step(tmp_path, metric):
    mode = "min" if metric == "loss" else "max"
    job = a_job(eval_every=Every(steps=3), metric=metric, metric_mode=mode, max_steps=24)
    store = SlowStore(tmp_path)
    policy = {"every": Every(steps=1, epochs=1), "milestones": (4, 11), "save_best": True}
    saver = a_saver(tmp_path, kind=Saver, store=store, **policy)
    assert loop.train(job, State(), saver, Stop(World()))
    best, improvements = None, []
    for line in job.tracker.of("eval"):
        value = -line[metric] if mode == "min" else line[metric]
        if best is None or value > best:
            best, improvements = value, [*improvements, line["step"]]
    required = {4, 8, 12, 16, 20, 24, 11, 22, 5, 10, 15, *improvements}
    steps = saved_steps(tmp_path)
    assert required <= set(steps)
    for commit in lineage.commits(store):
        if commit.step in improvements:
            manifest = lineage.read_manifest(store, commit)
            assert manifest.objects["run"]["best"]["step"] == commit.step
            assert lineage.measured(manifest, metric) is not None


def test_train_saves_a_best_evaluation_that_a_resume_repeats(tmp_path):
    settings = {"eval_every": Every(steps=4), "metric": "loss", "metric_mode": "min"}
    stop = Stop(World())
    stop.listen(["SIGUSR1"])
    try:
        stopped = a_job(task=Meddling(raised, evaluation=2), **settings)
        assert not loop.train(stopped, State(), a_saver(tmp_path), stop)
    finally:
        stop.restore_handlers()
    go_on(tmp_path, a_job(**settings), save_best=True)
    measured = [
        lineage.measured(lineage.read_manifest(open_store(str(tmp_path)), commit), "loss")
        for commit in lineage.commits(open_store(str(tmp_path)))
        if commit.step == 4
    ]
    assert [value is None for value in measured] == [True, False]


def test_train_takes_steps_when_no_attempt_is_long_enough_for_an_evaluation(tmp_path):
    steps, records = [], []
    for _ in range(12):
        job = a_job(eval_every=Every(steps=4), task=Meddling(raised, evaluation=2))
        job.skipped_eval_step = boundary.interrupted_eval_step(records)
        stop = Stop(World())
        stop.listen(["SIGUSR1"])
        try:
            state, finished = go_on(tmp_path, job, stop=stop)
        finally:
            stop.restore_handlers()
        first_step = steps[-1] if steps else 0
        steps.append(state.step)
        records.append({"first_step": first_step, "last_step": state.step, "outcome": "preempted"})
        assert not finished
    assert steps == [4, 4, 8, 8, *[12] * 8]  # the evaluation at the end is not left out
    job = a_job(eval_every=Every(steps=4))
    job.skipped_eval_step = boundary.interrupted_eval_step(records)
    assert go_on(tmp_path, job)[1]
    assert [line["step"] for line in job.tracker.of("eval")] == [12]


@pytest.mark.parametrize(
    ("record", "step"),
    [
        ({"first_step": 4, "last_step": 4, "outcome": "preempted"}, 4),
        ({"first_step": 4, "last_step": 4}, 4),  # killed
        ({"first_step": 4, "last_step": 4, "outcome": "error"}, None),
        ({"first_step": 4, "last_step": 5, "outcome": "preempted"}, None),
        ({"first_step": 4}, None),  # ended before training
        ({}, None),
    ],
)
def test_interrupted_eval_step_needs_an_attempt_without_steps_or_errors(record, step):
    assert boundary.interrupted_eval_step([{"outcome": "done"}, record]) == step


def test_train_without_evaluation_data_finishes(tmp_path):
    job = a_job(evaluation=None, eval_every=Every(steps=5))
    assert loop.train(job, state := State(), a_saver(tmp_path), Stop(World()))
    assert (state.metrics, state.best) == ({}, None)
    run = Run(name="a", run_dir=str(tmp_path), trainer=Trainer(max_steps=12))
    assert resume.finished(run, resume.choose(Replicas(open_store(str(tmp_path))), run, {}))


def test_train_lengthened_run_continues(tmp_path):
    undisturbed, state = a_job(max_steps=20), State()
    loop.train(undisturbed, state, a_saver(tmp_path / "a"), Stop(World()))
    loop.train(a_job(max_steps=9), State(), a_saver(tmp_path / "b"), Stop(World()))
    longer = a_job(max_steps=20)
    its_state, _ = go_on(tmp_path / "b", longer)
    assert its_state.step == state.step == 20
    for name, value in longer.model.state_dict().items():
        assert torch.equal(value, undisturbed.model.state_dict()[name])


def resumed(folder, job, config, **run_settings):
    """Load a run's newest checkpoint into a job that has this configuration."""
    settings = {"name": "a", "run_dir": str(folder), **run_settings}
    run = Run(**settings)
    return resume.load(job, resume.choose(Replicas(open_store(run.run_dir)), run, config))


@pytest.mark.parametrize("make_scheduler", [
    lambda o, steps: lr_scheduler.OneCycleLR(o, 0.4, total_steps=steps),
    lambda o, steps: lr_scheduler.CosineAnnealingLR(o, T_max=steps),
    lambda o, steps: lr_scheduler.PolynomialLR(o, total_iters=steps, power=2.0),
    lambda o, steps: schedule.warmup_cosine(o, steps, warmup_steps=3),
])  # fmt: skip
def test_train_lengthened_run_follows_the_longer_schedule(tmp_path, make_scheduler):
    def job(steps):
        return a_job(max_steps=steps, schedule=lambda o: make_scheduler(o, steps))

    def config(steps):
        return {"scheduler": {"length": "total_steps"}, "trainer": {"max_steps": steps}}

    def rates(job, steps):
        (phase,) = job.phases
        result = []
        for _ in range(steps):
            group = phase.optimizer.param_groups[0]
            result.append((group["lr"], group["momentum"]))
            phase.optimizer.step()
            phase.scheduler.step()
        return result

    expected = rates(job(20), 20)
    loop.train(job(9), State(), a_saver(tmp_path, config=config(9)), Stop(World()))
    longer, unchanged = job(20), job(9)
    assert resumed(tmp_path, longer, config(20)).step == 9
    assert rates(longer, 11) == expected[9:]
    resumed(tmp_path, unchanged, config(9))
    assert unchanged.phases[0].scheduler.last_epoch == 9


def test_other_samples_do_not_go_unnoticed(tmp_path):
    def job(samples):
        return a_job(dataset=Synthetic((6,), classes=3, train_samples=samples))

    loop.train(job(43), State(), a_saver(tmp_path / "a"), Stop(World()))
    with pytest.raises(ConfigError, match=f"has 51 samples but had 43 .*resume={tmp_path}/a"):
        resumed(tmp_path / "a", job(51), {})
    assert resumed(tmp_path / "a", job(43), {}).cursor == {"epoch": 2, "batch": 2}
    fork = resumed(tmp_path / "b", job(51), {}, resume=str(tmp_path / "a"))
    assert (fork.step, fork.cursor) == (12, {"epoch": 2, "batch": 0})


@pytest.mark.parametrize("changed", ["training", "evaluation"])
def test_resume_with_relabelled_data_warns_before_it_trains(tmp_path, changed):
    def job(relabelled, max_steps):
        datasets = {"training": DATA.train, "evaluation": DATA.eval}
        if relabelled:
            inputs, labels = datasets[changed].tensors
            datasets[changed] = TensorDataset(inputs, labels.max() - labels)
        streams = {
            "training": TrainStream(datasets["training"], World(), 5, BATCH),
            "evaluation": EvalStream(datasets["evaluation"], World(), 5),
        }
        job = a_job(data=streams["training"], evaluation=streams["evaluation"], max_steps=max_steps)
        job.fingerprints = {name: fingerprint(stream) for name, stream in streams.items()}
        return job

    go_on(tmp_path, job(False, 4))
    same, other = job(False, 6), job(True, 8)
    go_on(tmp_path, same)
    go_on(tmp_path, other)
    assert same.notes == []
    (note,) = other.notes
    assert f"the {changed} data differs from that of step 6: the same samples have another" in note
    fewer = job(False, 10)
    fewer.evaluation = EvalStream(TensorDataset(*DATA.eval[:20]), World(), 5)
    go_on(tmp_path, fewer)
    assert "the evaluation data has 20 samples but had 23 at step 8" in fewer.notes[0]


def test_train_tracks_the_best_value(tmp_path):
    job = a_job(eval_every=Every(steps=2), metric="loss", metric_mode="min")
    loop.train(job, state := State(), a_saver(tmp_path), Stop(World()))
    losses = {line["step"]: line["loss"] for line in job.tracker.of("eval")}
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=losses.get)
    assert state.best == {"value": losses[best], "step": best}


def test_train_unknown_metric_is_reported_with_the_closest_name(tmp_path):
    job = a_job(metric="acuracy")
    with pytest.raises(ConfigError, match=r"'acuracy' is not measured .*did you mean 'accuracy'"):
        loop.train(job, State(), a_saver(tmp_path), Stop(World()))


# --- loading -----------------------------------------------------------------------------------

OLD = {
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "trainer": {"global_batch_size": BATCH},
}  # fmt: skip


def forked(folder, new, job):
    """Save a run of 7 steps, whose configuration is OLD, and load it into a new run's job."""
    schedule = {"schedule": lambda o: lr_scheduler.StepLR(o, 3)}
    origin = a_job(max_steps=7, **schedule)
    loop.train(origin, state := State(), a_saver(folder / "a", config=OLD), Stop(World()))
    run = Run(name="b", run_dir=str(folder / "b"), resume=str(folder / "a"))
    return (
        origin,
        state,
        resume.load(job, resume.choose(Replicas(open_store(run.run_dir)), run, new)),
    )


def test_fork_starts_from_the_full_state(tmp_path):
    job = a_job(schedule=lambda o: lr_scheduler.StepLR(o, 3))
    origin, state, its_state = forked(tmp_path, OLD, job)
    assert everything(job, its_state) == everything(origin, state)


def test_hyper_parameters_that_a_fork_changes_win(tmp_path):
    def other(model):
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.8)

    new = {**OLD, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.8}}
    job = a_job(optimizer=other, schedule=lambda o: lr_scheduler.StepLR(o, 3))
    origin, _, its_state = forked(tmp_path, new, job)
    (group,) = job.phases[0].optimizer.param_groups
    assert (group["lr"], group["initial_lr"], group["momentum"]) == (0.5, 0.5, 0.8)
    assert group["nesterov"] is False  # no longer set: the optimizer's own default
    assert its_state.step == 7
    assert torch.equal(job.model.body[0].weight, origin.model.body[0].weight)
    train_step(job, next(job.data.batches(its_state.cursor))[0])


@pytest.mark.parametrize(("new", "cursor"), [
    (OLD, {"epoch": 1, "batch": 2}),
    ({**OLD, "seed": 5}, {"epoch": 1, "batch": 0}),
    ({**OLD, "data": {"_target_": "mine.Data"}}, {"epoch": 1, "batch": 0}),
    ({**OLD, "trainer": {"global_batch_size": 4}}, {"epoch": 1, "batch": 0}),
    ({**OLD, "trainer": {"global_batch_size": BATCH, "max_steps": 9}}, {"epoch": 1, "batch": 2}),
])  # fmt: skip
def test_fork_with_other_data_restarts_the_epoch(tmp_path, new, cursor):
    assert forked(tmp_path, new, a_job())[2].cursor == cursor


@pytest.mark.parametrize("rank", [0, 1])
def test_on_another_number_of_ranks_generators_are_derived_from_seed_step_and_rank(tmp_path, rank):
    loop.train(a_job(max_steps=7), State(), a_saver(tmp_path), Stop(World()))
    job = a_job(seed=3)
    job.world = World(rank=rank, size=2)
    resume.load(
        job, resume.choose(Replicas(open_store(str(tmp_path))), Run(name="a", run_dir="a"), {})
    )
    drawn = torch.rand(3)
    rng.seed_all(rng.derive("rank", 3, 7, rank))
    assert torch.equal(drawn, torch.rand(3))


def test_restore_rejects_a_different_model_by_tensor_name(tmp_path):
    loop.train(a_job(max_steps=1), State(), a_saver(tmp_path), Stop(World()))
    start = resume.choose(Replicas(open_store(str(tmp_path))), Run(name="a", run_dir="a"), {})
    with pytest.raises(CheckpointError, match=r"missing \['model.bias', 'model.weight'\]"):
        resume.load(a_job(model=nn.Linear(6, 3)), start)
    wider = Net()
    wider.body[4] = nn.Linear(8, 4)
    with pytest.raises(CheckpointError, match=r"F32 \[3, 8\], this model needs F32 \[4, 8\]"):
        resume.load(a_job(model=wider), start)


# --- schedulers and the scaler -----------------------------------------------------------------


def test_scheduler_steps_per_step_or_per_epoch(tmp_path):
    per_step = a_job(schedule=lambda o: lr_scheduler.StepLR(o, 4))
    loop.train(per_step, State(), a_saver(tmp_path / "a"), Stop(World()))
    rates = [line["lr"] for line in per_step.tracker.of("train")]
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 4)
    schedule = {"schedule": lambda o: lr_scheduler.StepLR(o, 1), "scheduler_interval": "epoch"}
    per_epoch = a_job(**schedule)
    loop.train(per_epoch, State(), a_saver(tmp_path / "b"), Stop(World()))
    rates = [line["lr"] for line in per_epoch.tracker.of("train")]
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 5 + [0.001] * 2)


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), (None, "min")])
def test_plateau_steps_after_each_evaluation_by_metric_or_loss(tmp_path, metric, mode):
    def schedule(optimizer):
        return lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, patience=1, threshold=0.05)

    job = a_job(schedule=schedule, eval_every=Every(steps=2), metric=metric, max_steps=24)
    loop.train(job, State(), a_saver(tmp_path), Stop(World()))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    twin = schedule(optimizer)
    expected = []
    for line in job.tracker.lines:
        if line["split"] == "eval":
            twin.step(line[metric or "loss"])
        else:
            expected.append(optimizer.param_groups[0]["lr"])
    rates = [line["lr"] for line in job.tracker.of("train")]
    assert rates == expected
    assert len(set(rates)) > 1  # the table was worth making


def test_update_skipped_by_the_scaler_is_counted_and_changes_nothing(tmp_path):
    seen = []

    class Watching(Lines):
        def log(self, line):
            super().log(line)
            if line["split"] == "train":
                seen.append(job.model.body[0].weight.clone())

    job = a_job(
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0), tracker=Watching(),
        task=Meddling(infinite, training=3), schedule=lambda o: lr_scheduler.StepLR(o, 1, 0.5),
        clip_norm=1.0,
    )  # fmt: skip
    loop.train(job, state := State(), a_saver(tmp_path), Stop(World()))
    assert (state.step, state.skipped, state.samples) == (12, 1, 96)
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False] + [True] * 9
    assert job.scaler.get_scale() == 512.0
    rates = [line["lr"] for line in job.tracker.of("train")]
    assert rates[:5] == pytest.approx([0.1, 0.05, 0.025, 0.025, 0.0125])  # no update, no decay


def test_scaler_resumes_exactly(tmp_path):
    def job(**changes):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4)
        return a_job(scaler=scaler, **changes)

    undisturbed, state = job(), State()
    loop.train(undisturbed, state, a_saver(tmp_path / "a"), Stop(World()))
    assert undisturbed.scaler.get_scale() == 64.0 * 2**3
    broken = job(task=Meddling(killed, training=8))
    with pytest.raises(Killed):
        loop.train(broken, State(), a_saver(tmp_path / "b", every=Every(steps=3)), Stop(World()))
    again = job()
    its_state, _ = go_on(tmp_path / "b", again)
    assert everything(again, its_state) == everything(undisturbed, state)


def test_scaling_by_powers_of_two_changes_no_bit():
    plain, scaled = a_job(), a_job(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    for job in (plain, scaled):
        rng.seed_all(7)
        for microbatches, _ in islice(job.data.batches(BEGINNING), 4):
            train_step(job, microbatches)
    for actual, reference in zip(scaled.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(actual, reference)


# --- what a checkpoint gets --------------------------------------------------------------------


def test_collect_lists_the_contents_per_rank():
    job = a_job(optimizer=lambda model: torch.optim.Adam(model.parameters()))
    train_step(job, next(job.data.batches(BEGINNING))[0])
    content = collect(job, State(step=3))
    names = {*content.tensors, *content.rank_local}
    parameters = {name for name, _ in job.model.named_parameters()}
    assert {f"model.{name}" for name in job.model.state_dict()} <= names
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert {f"optimizer.{name}.{key}" for name in parameters} <= names
    assert {"rng.0.python", "rng.0.numpy", "rng.0.torch"} <= names
    assert content.objects["run"] == State(step=3).state_dict()
    job.world = World(rank=1, size=2)
    buffers = {f"model.{name}" for name, _ in job.model.named_buffers()}
    assert names - {n for n in collect(job, State()).tensors if not n.startswith("rng.1")} == {
        *buffers, "rng.0.python", "rng.0.numpy", "rng.0.torch",
        *(name for name in names if name.startswith("rng.0.cuda")),
    }  # fmt: skip


def test_settle_buckets_does_nothing_on_one_rank():
    job = a_job()
    before = everything(job, State())
    warm_up(job)
    assert everything(job, State()) == before


def test_train_step_accepts_a_dataset_of_one_tensor():
    class Rebuild(Classification):
        def loss(self, model, batch):
            (inputs,) = batch
            outputs = model(inputs)
            return outputs.square().mean(), outputs

        def train_metrics(self, outputs, batch):
            return {}

    data = TrainStream(TensorDataset(DATA.train.tensors[0]), World(), 0, BATCH)
    job = a_job(task=Rebuild(), data=data, evaluation=None)
    metrics, _ = train_step(job, next(job.data.batches(BEGINNING))[0], with_metrics=True)
    assert list(metrics) == ["loss"]
