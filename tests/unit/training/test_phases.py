"""Tasks with phases: two models, two optimizers, updates in turn, as a loop by hand has them."""

import math
from itertools import islice

import pytest
import torch
from support.gan_jobs import RATES, adam, gan_job, images, net
from support.loop_jobs import BEGINNING, Lines, everything, go_on
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from trainer.cluster.stop import Stop
from trainer.cluster.world import World
from trainer.config.merge import merge
from trainer.core import rng
from trainer.core.intervals import Every
from trainer.core.state import State
from trainer.errors import ConfigError, TrainingError
from trainer.task import Adversarial
from trainer.training import build, parameters
from trainer.training.evaluation import evaluate
from trainer.training.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


# --- one step ----------------------------------------------------------------------------------


def by_hand(model, optimizers, microbatches, clip_norm):
    """The step of a loop for two models that anyone would write; returns the two losses."""
    losses = []
    for phase, subnet in (("discriminator", model.discriminator), ("generator", model.generator)):
        total = 0.0
        for real, _ in microbatches:
            noise = torch.randn(len(real), 3)
            if phase == "discriminator":
                fake = model.generator(noise).detach()
                on_real, on_fake = model.discriminator(real), model.discriminator(fake)
                loss = F.binary_cross_entropy_with_logits(on_real, torch.ones(len(real)))
                loss = loss + F.binary_cross_entropy_with_logits(on_fake, torch.zeros(len(real)))
            else:
                on_fake = model.discriminator(model.generator(noise))
                loss = F.binary_cross_entropy_with_logits(on_fake, torch.ones(len(real)))
            if len(microbatches) > 1:
                loss = loss * (1 / len(microbatches))
            loss.backward()
            total += loss.item()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(subnet.parameters(), clip_norm)
        optimizers[phase].step()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_every_step_is_bit_equal_to_a_loop_written_by_hand(accumulate, clip_norm):
    job = gan_job(accumulate, clip_norm=clip_norm, ema_decay=0.8)
    twin = net()
    optimizers = {name: adam(name, getattr(twin, name).parameters()) for name in RATES}
    averages = [parameter.detach().clone() for parameter in twin.parameters()]
    both = rng.capture()
    for microbatches, _ in islice(job.data.batches(BEGINNING), 5):
        rng.restore(both)
        losses = by_hand(twin, optimizers, microbatches, clip_norm)
        for average, parameter in zip(averages, twin.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - 0.8)
        rng.restore(both)
        metrics, applied = train_step(job, microbatches)
        both = rng.capture()
        assert applied == [True, True]
        assert metrics["discriminator_loss"].item() == pytest.approx(losses[0], rel=1e-6)
        assert metrics["generator_loss"].item() == pytest.approx(losses[1], rel=1e-6)
        assert metrics["loss"].item() == pytest.approx(sum(losses), rel=1e-6)
        for actual, reference in zip(job.model.state_dict().values(), twin.state_dict().values(),
                                strict=True):  # fmt: skip
            assert torch.equal(actual, reference)
    for actual, reference in zip(job.ema.averages.values(), averages, strict=True):
        assert torch.equal(actual, reference)


def test_no_gradient_is_computed_for_what_another_phase_trains():
    seen = {}
    job = gan_job()

    def look(phase):
        seen[phase] = {
            name.split(".")[0] for name, p in job.model.named_parameters() if p.grad is not None
        }

    hooks = [
        phase.optimizer.register_step_pre_hook(lambda *_, name=phase.name: look(name))
        for phase in job.phases
    ]
    train_step(job, next(job.data.batches(BEGINNING))[0])
    assert seen == {"discriminator": {"discriminator"}, "generator": {"generator"}}
    assert all(p.requires_grad and p.grad is None for p in job.model.parameters())
    for hook in hooks:
        hook.remove()


def test_figures_have_the_phases_names():
    job = gan_job(clip_norm=1.0)
    metrics, _ = train_step(job, next(job.data.batches(BEGINNING))[0], with_metrics=True)
    assert list(metrics) == [
        "loss", "discriminator_loss", "discriminator_real", "discriminator_fake",
        "discriminator_grad_norm", "generator_loss", "generator_grad_norm",
    ]  # fmt: skip
    assert 0 < metrics["discriminator_real"] < 1


# --- a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_phases_stopped_and_resumed_end_with_the_same_bits(tmp_path, precision):
    changes = {
        "accumulate": 2, "clip_norm": 0.5, "ema_decay": 0.9, "precision": precision,
        "eval_every": Every(steps=4), "schedule": lambda o: lr_scheduler.StepLR(o, 3),
    }  # fmt: skip
    undisturbed = gan_job(**changes)
    state, _ = go_on(tmp_path / "undisturbed", undisturbed)
    go_on(tmp_path / "halves", gan_job(**changes, max_steps=7))
    rest = gan_job(**changes)
    for phase in rest.phases:
        phase.optimizer.param_groups[0]["lr"] = 9.0  # the checkpoint alone decides
    its_state, _ = go_on(tmp_path / "halves", rest)
    assert everything(rest, its_state) == everything(undisturbed, state)
    assert [g["lr"] for p in rest.phases for g in p.optimizer.param_groups] == pytest.approx(
        [0.02 * 0.1**4, 0.01 * 0.1**4]
    )


def test_lines_have_both_learning_rates_and_evaluations_both_losses(tmp_path):
    tracker = Lines()
    job = gan_job(tracker=tracker, max_steps=2, eval_every=Every(steps=2))
    go_on(tmp_path, job)
    line = tracker.of("train")[-1]
    assert (line["lr"], line["lr_discriminator"], line["lr_generator"]) == (0.02, 0.02, 0.01)
    result = tracker.of("eval")[-1]
    assert result["loss"] == pytest.approx(result["discriminator_loss"] + result["generator_loss"])
    assert 0 < result["discriminator_fake"] < 1


def test_phases_evaluation_covers_every_sample_without_side_effects():
    job = gan_job()
    before = rng.capture(), job.model.state_dict()["discriminator.layers.0.weight"].clone()
    result = evaluate(job, State(), Stop(World()))
    job.model.eval()
    with torch.no_grad():
        real = job.model.discriminator(images().tensors[0]).sigmoid().mean()
    assert result["discriminator_real"] == pytest.approx(real.item(), rel=1e-5)
    assert all(torch.equal(a, rng.capture()[name]) for name, a in before[0].items())
    assert job.phases[0].wrapped.training


# --- what is not finite ------------------------------------------------------------------------


class Bad(Adversarial):
    """Its loss of one phase is not finite at one call."""

    def __init__(self, phase, call, factor=math.inf):
        super().__init__()
        self.phase, self.call, self.factor, self.count = phase, call, factor, 0

    def loss(self, model, batch, phase):
        loss, outputs = super().loss(model, batch, phase)
        self.count += phase == self.phase
        bad = phase == self.phase and self.count == self.call
        return (loss * self.factor if bad else loss), outputs


@pytest.mark.parametrize("bad", ["discriminator", "generator"])
@pytest.mark.parametrize("scaled", [False, True])
def test_phases_skipped_update_of_one_phase_counts_the_step_as_skipped(tmp_path, bad, scaled):
    other = {"discriminator": "generator", "generator": "discriminator"}[bad]
    how = {"skip_nonfinite": True}
    if scaled:
        how = {"scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}
    job = gan_job(task=Bad(bad, 3), max_steps=3, **how)
    counted = {phase.name: 0 for phase in job.phases}

    def count(name):
        counted[name] += 1

    hooks = [
        phase.optimizer.register_step_post_hook(lambda *_, name=phase.name: count(name))
        for phase in job.phases
    ]
    state, done = go_on(tmp_path, job)
    for hook in hooks:
        hook.remove()
    assert done
    assert (state.step, state.skipped) == (3, 1)
    assert counted == {bad: 2, other: 3}
    assert [line["skipped"] for line in job.tracker.of("train")] == [0, 0, 1]


@pytest.mark.parametrize("bad", ["discriminator", "generator"])
def test_otherwise_the_run_stops_and_names_the_phase_and_its_learning_rate(tmp_path, bad):
    with pytest.raises(TrainingError) as caught:
        go_on(tmp_path, gan_job(task=Bad(bad, 3, math.nan), log_every_steps=100))
    assert f"the {bad} loss of step 3 is nan" in str(caught.value)
    assert f"learning rate {RATES[bad]:g}" in str(caught.value)


# --- whose a parameter is ----------------------------------------------------------------------


def test_patterns_divide_the_parameters_that_are_trained():
    model = net()
    parameters.freeze(model, ["generator.layers.0.*"])
    names, lines = parameters.phases(model, {"g": ["generator.*"], "d": "discriminator.*"})
    assert list(names) == ["g", "d"]
    assert names["d"] == [n for n, _ in model.named_parameters() if n.startswith("discrim")]
    assert "generator.layers.0.weight" not in names["g"]
    assert lines[0].startswith("phase g  generator.*  4 tensors")


@pytest.mark.parametrize(("stated", "frozen", "message"), [
    ({"d": "discriminator.*", "g": "genrator.*"}, [], r"phase 'g'.*matches 'genrator\.\*' \(valid"),
    ({"d": "*", "g": "generator.*"}, [], r"two phases of the task, 'd' and 'g'"),
    ({"g": "generator.*"}, [], r"'discriminator\..*no phase of the task \(g\)"),
    ({"d": "discriminator.*", "g": "generator.*"}, ["generator.*"], "phase 'g'.*all of it is froz"),
])  # fmt: skip
def test_phases_rejects_patterns_that_do_not_partition_parameters(stated, frozen, message):
    model = net()
    parameters.freeze(model, frozen)
    with pytest.raises(ConfigError, match=message):
        parameters.phases(model, stated)


@pytest.mark.parametrize(("phases_setting", "message"), [
    ({"generatr": {"lr": 1}}, r"'generatr', which is not a phase.*did you mean 'generator'"),
    ({"generator": 1}, "is not a mapping of phases"),
    ([], "is not a mapping of phases"),
])  # fmt: skip
def test_phases_rejects_settings_of_an_unknown_phase(phases_setting, message):
    with pytest.raises(AssertionError, match=message):
        assert parameters.check_phases(phases_setting, RATES) == ""
    assert parameters.check_phases({"any": {"lr": 1}}, None) == ""
    assert "has no phases" in parameters.check_phases({"any": {"lr": 1}}, ())


# --- from a configuration ----------------------------------------------------------------------

CONFIG = {
    "name": "a",
    "run_dir": "a",
    "sample": {"shape": [1, 8, 8]},
    "model": {"_target_": "models.dcgan.DCGAN", "input_shape": [1, 8, 8], "latent": 3, "width": 4},
    "data": {"_target_": "trainer.data.synthetic.Synthetic", "shape": [1, 8, 8], "classes": 2},
    "task": {"_target_": "trainer.task.Adversarial"},
    "optimizer": {
        "_target_": "torch.optim.Adam",
        "lr": 0.1,
        "groups": [{"names": ["*.layers.1.*"], "weight_decay": 0.5}],
        "phases": {"generator": {"lr": 0.2}},
    },
    "scheduler": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_steps"},
}


def configured(**optimizer):
    from omegaconf import OmegaConf

    node = {**CONFIG, "optimizer": {**CONFIG["optimizer"], **optimizer}}
    run, problems = merge(OmegaConf.create(node))
    assert problems == []
    return run


def test_each_phase_gets_an_optimizer_with_its_settings_and_a_schedule():
    run = configured()
    assert build.check(run) == []
    job = build.build_job(run, World(), build.build_data(run), Lines())
    assert [phase.name for phase in job.phases] == ["discriminator", "generator"]
    result = [[g["lr"] for g in phase.optimizer.param_groups] for phase in job.phases]
    assert result == [[0.1], [0.2, 0.2]]  # an 8x8 discriminator has no layer 1 with parameters
    decays = [g["weight_decay"] for g in job.phases[1].optimizer.param_groups]
    assert decays == [0, 0.5]
    assert job.phases[0].scheduler.T_max == job.max_steps
    trained = [p for phase in job.phases for p in phase.parameters(job.model)]
    assert {id(p) for p in trained} == {id(p) for p in job.model.parameters()}
    assert len(trained) == len(list(job.model.parameters()))
    assert any(note.startswith("phase generator  generator.*") for note in job.notes)


@pytest.mark.parametrize(("phases", "key", "text"), [
    ({"genrator": {"lr": 1.0}}, "optimizer.phases", "did you mean 'generator'"),
    ({"generator": {"lrr": 1.0}}, "optimizer.phases.generator.lrr", "did you mean 'lr'"),
    ({"generator": {"_target_": "x"}}, "optimizer.phases.generator._target_", "same optimizer"),
])  # fmt: skip
def test_settings_of_a_phase_are_checked_before_anything_runs(phases, key, text):
    problems = build.check(configured(phases=phases))
    assert [problem.key for problem in problems] == [key]
    assert text in problems[0].text


def test_phases_rejects_settings_for_a_task_without_phases():
    run = configured()
    object.__setattr__(run, "task", {"_target_": "trainer.task.Classification"})
    with pytest.raises(ConfigError, match="'generator', but the task has no phases"):
        build.build_job(run, World(), build.build_data(run), Lines())
