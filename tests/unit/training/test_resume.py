"""Where a run goes on from: what differs, what refuses, what was asked for and what is there."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tests.support.run_configs import CONFIG, changed
from trainer.checkpoint import Content, Writer, lineage, save
from trainer.checkpoint.dcp import PerdureStorageWriter
from trainer.checkpoint.replicas import Replicas
from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Init, Run, Trainer
from trainer.core.state import State
from trainer.errors import CheckpointError, ConfigError
from trainer.storage import open_store
from trainer.training.resume import Start, choose, finished, load_weights

# --- choosing ----------------------------------------------------------------------------------


class ARun:
    """A run directory with small real checkpoints."""

    def __init__(self, folder):
        self.folder = folder
        self.store = open_store(str(folder))

    def attempt(self, steps, *, resumed=(0, None), resume="auto", config=CONFIG, accuracy=None):
        """Be an attempt that resumed somewhere and saved `steps`."""
        attempt = lineage.begin(self.store, {"resume": resume})
        origin = {"step": resumed[0], "attempt": resumed[1]}
        lineage.amend(self.store, attempt, {"resumed_from": origin})
        writer = Writer(self.store, World(), attempt)
        for step in steps:
            state = State(step=step)
            if step in (accuracy or {}):
                state.evaluated({"accuracy": accuracy[step]}, metric="accuracy", mode="max")
            tensors = {"model.w": torch.full((2,), float(step))}
            content = Content(tensors=tensors, objects={"run": state.state_dict()})
            save(writer, content, step=step, epoch=step // 10, config=config)
        return attempt

    def choose(self, resume="auto", config=CONFIG, **run):
        wanted = Run(
            name="a", run_dir=str(self.folder), resume=resume,
            **{"checkpoint": Checkpoint(metric="accuracy"), **run},
        )  # fmt: skip
        return choose(Replicas(self.store), wanted, config)

    def manifest(self, step):
        (found,) = self.folder.glob(f"checkpoints/step-{step:08d}.*/manifest.json")
        return found


@pytest.fixture
def run(tmp_path):
    return ARun(tmp_path / "run")


def test_a_run_without_checkpoints_starts_from_scratch(run):
    assert run.choose() == run.choose("never") == Start()
    assert Start().step == 0
    assert not run.folder.exists()


def test_auto_goes_on_from_the_newest(run):
    run.attempt([5, 10, 15])
    start = run.choose()
    assert (start.step, start.is_fork, start.is_named, start.skipped) == (15, False, False, ())
    assert start.manifest.step == 15


def test_auto_ignores_what_a_later_attempt_left_behind(run):
    run.attempt([5, 10, 15])
    run.attempt([], resumed=(10, 1))
    assert run.choose().step == 10


def test_auto_passes_over_a_damaged_manifest_and_says_so(run):
    run.attempt([5, 10])
    run.manifest(10).write_bytes(run.manifest(10).read_bytes().replace(b'"epoch":1', b'"epoch":2'))
    start = run.choose()
    assert start.step == 5
    assert len(start.skipped) == 1
    assert "step-00000010" in start.skipped[0]


def test_checkpoints_that_were_found_damaged_are_passed_over(run):
    run.attempt([5, 10])
    commits = [(commit, (run.store.url,)) for commit in lineage.commits(run.store)]
    wanted = Run(name="a", run_dir=str(run.folder))
    assert choose(Replicas(run.store), wanted, CONFIG, damaged=[commits[-1]]).step == 5
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        choose(Replicas(run.store), wanted, CONFIG, damaged=commits)


def test_when_all_are_marked_damaged_the_run_is_not_begun_anew(run):
    run.attempt([5])
    lineage.mark_damaged(run.store, lineage.commits(run.store)[0], "a test")
    for request in ("auto", "never"):
        with pytest.raises(CheckpointError, match="Refusing to start from scratch"):
            run.choose(request)


def test_never_is_refused_where_there_are_checkpoints(run):
    run.attempt([5, 10])
    with pytest.raises(ConfigError, match=r"has checkpoints up to step 10. Choose another name="):
        run.choose("never")


def test_a_step_is_found_by_its_number(run):
    run.attempt([5, 10, 15])
    start = run.choose("10")
    assert (start.step, start.is_named, start.is_fork) == (10, True, False)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(run):
    run.attempt([5, 10])
    with pytest.raises(ConfigError, match="steps available: 5, 10"):
        run.choose("7")


def test_a_digit_that_is_no_number_is_not_taken_for_a_step(run):
    with pytest.raises(ConfigError, match="no committed checkpoint there"):
        run.choose("²")


@pytest.mark.parametrize(("mode", "step"), [("max", 10), ("min", 15)])
def test_best_is_the_best_measured_checkpoint_the_earliest_of_equal_ones(run, mode, step):
    accuracy = {5: float("nan"), 10: 0.9, 15: 0.5, 20: 0.9, 25: 0.5}
    run.attempt([5, 10, 15, 20, 25, 30], accuracy=accuracy)
    start = run.choose("best", checkpoint=Checkpoint(metric="accuracy", mode=mode))
    assert (start.step, start.is_named) == (step, True)


def test_best_counts_only_what_was_measured_at_the_checkpoints_own_step(run):
    attempt = run.attempt([5], accuracy={5: 0.5})
    later = State(step=10, last_eval_step=8, metrics={"accuracy": 0.99})
    content = Content(objects={"run": later.state_dict()})
    save(Writer(run.store, World(), attempt), content, step=10, config=CONFIG)
    assert run.choose("best").step == 5


def test_best_without_a_measured_metric_is_refused(run):
    run.attempt([5, 10])
    with pytest.raises(ConfigError, match=r"set checkpoint\.metric"):
        run.choose("best")
    run.attempt([15], resumed=(10, 1), accuracy={15: 0.5})
    with pytest.raises(ConfigError, match=r"set checkpoint\.metric"):
        run.choose("best", checkpoint=Checkpoint(metric=None))


@pytest.mark.parametrize("request_", ["5", "best"])
def test_a_named_step_is_honoured_once(run, request_):
    run.attempt([5, 10, 15], accuracy={5: 0.9, 10: 0.1})
    assert run.choose(request_).step == 5
    run.attempt([7], resumed=(5, 1), resume=request_)
    again = run.choose(request_)  # the same command, after a preemption
    assert (again.step, again.is_named) == (7, False)
    run.attempt([9], resumed=(7, 2), resume=request_)
    assert run.choose(request_).step == 9


def test_a_named_step_is_asked_for_again_when_the_attempt_never_got_there(run):
    run.attempt([5, 10])
    lineage.begin(run.store, {"resume": "5"})  # it died before it had loaded anything
    assert run.choose("5").step == 5


def test_a_named_step_can_be_asked_for_anew_after_another_command(run):
    run.attempt([5, 10])
    run.attempt([7], resumed=(5, 1), resume="5")
    run.attempt([9], resumed=(7, 2), resume="auto")
    assert run.choose("5").step == 5


def test_an_attempt_that_asks_again_does_not_count_itself(run):
    run.attempt([5, 10])
    attempt = lineage.begin(run.store, {"resume": "5"})
    wanted = Run(name="a", run_dir=str(run.folder), resume="5")
    lineage.amend(run.store, attempt, {"resumed_from": {"step": 5, "attempt": 1}})
    assert choose(Replicas(run.store), wanted, CONFIG, attempt=attempt.number).is_named
    assert not choose(Replicas(run.store), wanted, CONFIG).is_named  # but the next one does


def test_never_is_honoured_once_too(run):
    assert run.choose("never") == Start()
    run.attempt([5], resume="never")
    assert run.choose("never").step == 5


# --- another run's checkpoint ------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    made = ARun(tmp_path / "other")
    made.attempt([5, 10])
    return made


@pytest.mark.parametrize(("form", "step"), [
    ("{run}", 10), ("file://{run}", 10), ("{run}/checkpoints/step-00000005.0001", 5),
    ("{run}/checkpoints/step-00000005.0001/", 5),
    ("{run}/checkpoints/step-00000005.0001/manifest.json", 5),
])  # fmt: skip
def test_a_path_forks_another_runs_checkpoint(run, other, form, step):
    start = run.choose(form.format(run=other.folder))
    assert (start.step, start.is_fork) == (step, True)
    assert start.urls == (str(other.folder),)


def test_a_fork_may_change_anything_and_shows_it(run, other):
    start = run.choose(str(other.folder), config=changed(model__hidden=99, name="b"))
    assert [str(difference) for difference in start.differences] == ["model.hidden: 16 -> 99"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_another_loop_saved_is_no_state_of_a_run(run, tmp_path):
    folder = tmp_path / "checkpoints/step-00000003.0000"
    dcp.save({"model.w": torch.ones(2)}, storage_writer=PerdureStorageWriter(folder))
    with pytest.raises(ConfigError, match=r"by another loop; .* init\.weights="):
        run.choose(str(folder))


def test_a_fork_with_another_optimizer_is_refused(run, other):
    config = changed(optimizer___target_="torch.optim.Adam")
    with pytest.raises(
        ConfigError, match=r"torch\.optim\.SGD -> torch\.optim\.Adam.*init\.weights"
    ):
        run.choose(str(other.folder), config=config)


def test_a_path_is_where_a_run_begins_and_not_where_it_goes_on(run, other):
    run.attempt([20], resume=str(other.folder))
    start = run.choose(str(other.folder))
    assert (start.step, start.is_fork) == (20, False)


@pytest.mark.parametrize("path", ["{tmp}", "{tmp}/none", "{run}/checkpoints/step-00000007.0001",
                                  "newest"])  # fmt: skip
def test_a_path_without_a_checkpoint_is_refused(tmp_path, run, other, path):
    request_ = path.format(tmp=tmp_path, run=other.folder)
    with pytest.raises(ConfigError) as caught:
        run.choose(request_)
    assert f"resume={request_}: no committed checkpoint there" in str(caught.value)


# --- refusing and finishing --------------------------------------------------------------------


def test_a_configuration_that_cannot_continue_is_refused_with_the_difference_and_ways_out(run):
    run.attempt([5])
    with pytest.raises(ConfigError) as caught:
        run.choose(config=changed(model__hidden=99, seed=3, trainer__max_epochs=9))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  model.hidden: 16 -> 99", "  seed: 0 -> 3"]
    assert "max_epochs" not in str(caught.value)
    assert f"name=… resume={run.folder} " in str(caught.value)
    assert "name=… init.weights=<file>" in str(caught.value)


def test_safe_changes_are_accepted_and_shown(run):
    run.attempt([5])
    start = run.choose(config=changed(trainer__max_epochs=9))
    assert [str(difference) for difference in start.differences] == ["trainer.max_epochs: 3 -> 9"]


@pytest.mark.parametrize(("limits", "done"), [
    (Trainer(max_epochs=1, max_steps=None), True),  # the checkpoint is at step 15, epoch 1
    (Trainer(max_epochs=2, max_steps=None), False),
    (Trainer(max_epochs=None, max_steps=15), True),
    (Trainer(max_epochs=None, max_steps=16), False),
    (Trainer(max_epochs=None, max_steps=3), True),
    (Trainer(max_epochs=2, max_steps=15), True),
    (Trainer(max_epochs=1, max_steps=99), True),
])  # fmt: skip
def test_a_run_is_finished_at_the_first_limit_that_it_has_reached(run, limits, done):
    run.attempt([15], accuracy={15: 0.5})
    wanted = Run(name="a", run_dir=str(run.folder), trainer=limits)
    start = choose(Replicas(run.store), wanted, CONFIG)
    assert finished(wanted, start) is done
    assert not finished(wanted, replace(start, is_fork=True))
    assert not finished(wanted, Start())


def test_a_run_whose_last_evaluation_was_cut_short_is_not_finished(run):
    run.attempt([15])
    wanted = Run(name="a", run_dir=str(run.folder), trainer=Trainer(max_epochs=1))
    assert not finished(wanted, choose(Replicas(run.store), wanted, CONFIG))


# --- weights alone -----------------------------------------------------------------------------


def test_weights_are_taken_over_exactly(tmp_path):
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, Init(weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    save_file(torch.nn.Linear(3, 2, bias=False).state_dict(), tmp_path / "fewer")
    save_file(torch.nn.Linear(4, 2).state_dict(), tmp_path / "wider")
    (tmp_path / "text").write_text("no safetensors file")
    for name, text in (("fewer", "bias"), ("wider", "weight  shape [2, 4]"), ("text", "")):
        with pytest.raises(ConfigError, match=f"init.weights=.*{name} does not fit") as caught:
            load_weights(torch.nn.Linear(3, 2), Init(weights=str(tmp_path / name)))
        assert text in str(caught.value)
