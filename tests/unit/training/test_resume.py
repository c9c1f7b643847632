"""Selection of the checkpoint to start from, and its errors."""

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
from trainer.training.resume import Start, choose, final_value, finished, load_weights

# --- choosing ----------------------------------------------------------------------------------


class ARun:
    """A run directory with small real checkpoints."""

    def __init__(self, folder):
        self.folder = folder
        self.store = open_store(str(folder))

    def attempt(self, steps, *, resumed=(0, None), resume="auto", config=CONFIG, accuracy=None):
        """Record an attempt that resumed from `resumed` and saved `steps`."""
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
        run_config = Run(
            name="a", run_dir=str(self.folder), resume=resume,
            **{"checkpoint": Checkpoint(metric="accuracy"), **run},
        )  # fmt: skip
        return choose(Replicas(self.store), run_config, config)

    def final_value(self, metric):
        return final_value(
            Run(name="a", run_dir=str(self.folder), checkpoint=Checkpoint(metric=metric))
        )

    def manifest(self, step):
        (manifest,) = self.folder.glob(f"checkpoints/step-{step:08d}.*/manifest.json")
        return manifest


@pytest.fixture
def run(tmp_path):
    return ARun(tmp_path / "run")


def test_choose_without_checkpoints_starts_from_scratch(run):
    assert run.choose() == run.choose("never") == Start()
    assert Start().step == 0
    assert not run.folder.exists()


def test_choose_auto_returns_the_newest(run):
    run.attempt([5, 10, 15])
    start = run.choose()
    assert (start.step, start.is_fork, start.is_named, start.skipped) == (15, False, False, ())
    assert start.manifest.step == 15


def test_choose_auto_ignores_orphaned_checkpoints(run):
    run.attempt([5, 10, 15])
    run.attempt([], resumed=(10, 1))
    assert run.choose().step == 10


def test_choose_auto_skips_a_damaged_manifest_and_reports_it(run):
    run.attempt([5, 10])
    run.manifest(10).write_bytes(run.manifest(10).read_bytes().replace(b'"epoch":1', b'"epoch":2'))
    start = run.choose()
    assert start.step == 5
    assert len(start.skipped) == 1
    assert "step-00000010" in start.skipped[0]


def test_choose_skips_checkpoints_passed_as_damaged(run):
    run.attempt([5, 10])
    commits = [(commit, (run.store.url,)) for commit in lineage.commits(run.store)]
    run_config = Run(name="a", run_dir=str(run.folder))
    assert choose(Replicas(run.store), run_config, CONFIG, damaged=[commits[-1]]).step == 5
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        choose(Replicas(run.store), run_config, CONFIG, damaged=commits)


def test_choose_all_damaged_raises_instead_of_starting_over(run):
    run.attempt([5])
    lineage.mark_damaged(run.store, lineage.commits(run.store)[0], "a test")
    for request in ("auto", "never"):
        with pytest.raises(CheckpointError, match="Refusing to start from scratch"):
            run.choose(request)


@pytest.mark.parametrize("request_", ["auto", "other"])
def test_choose_missing_checkpoints_raises_instead_of_starting_over(run, other, request_):
    attempt = run.attempt([5])
    lineage.amend(run.store, attempt, {"committed_step": 5})
    run.folder.joinpath("checkpoints").rename(run.folder / "moved")
    request_ = str(other.folder) if request_ == "other" else request_
    with pytest.raises(CheckpointError, match="no checkpoint, but its attempt 1 had one at step 5"):
        run.choose(request_)
    run.folder.joinpath("checkpoints").symlink_to("gone")  # a disk that is not mounted
    with pytest.raises(CheckpointError, match="start over in the same directory with resume=never"):
        run.choose(request_)
    assert run.choose("never") == Start()
    run.attempt([], resume="never")
    assert run.choose("auto") == Start()  # the newest start from scratch has lost nothing


def test_choose_missing_resumed_checkpoint_raises(run):
    run.attempt([5])
    run.attempt([], resumed=(5, 1))
    run.folder.joinpath("checkpoints").rename(run.folder / "moved")
    with pytest.raises(CheckpointError, match="its attempt 2 had one at step 5"):
        run.choose()


def test_choose_follows_links_to_checkpoints(run, tmp_path):
    run.attempt([5])
    (folder,) = run.folder.glob("checkpoints/step-*")
    folder.rename(tmp_path / folder.name)
    folder.symlink_to(tmp_path / folder.name)
    assert run.choose().step == 5


def test_choose_never_with_checkpoints_raises(run):
    run.attempt([5, 10])
    with pytest.raises(
        ConfigError, match=r"has checkpoints up to step 10. Start a new run with name="
    ):
        run.choose("never")


def test_choose_step_returns_that_checkpoint(run):
    run.attempt([5, 10, 15])
    start = run.choose("10")
    assert (start.step, start.is_named, start.is_fork) == (10, True, False)


def test_choose_missing_step_lists_the_steps(run):
    run.attempt([5, 10])
    with pytest.raises(ConfigError, match="steps available: 5, 10"):
        run.choose("7")


def test_choose_superscript_digit_is_not_a_step(run):
    with pytest.raises(ConfigError, match="no committed checkpoint there"):
        run.choose("²")


@pytest.mark.parametrize(("mode", "step"), [("max", 10), ("min", 15)])
def test_choose_best_returns_the_earliest_of_the_best(run, mode, step):
    accuracy = {5: float("nan"), 10: 0.9, 15: 0.5, 20: 0.9, 25: 0.5}
    run.attempt([5, 10, 15, 20, 25, 30], accuracy=accuracy)
    start = run.choose("best", checkpoint=Checkpoint(metric="accuracy", mode=mode))
    assert (start.step, start.is_named) == (step, True)


def test_choose_best_ignores_metrics_of_other_steps(run):
    attempt = run.attempt([5], accuracy={5: 0.5})
    later = State(step=10, last_eval_step=8, metrics={"accuracy": 0.99})
    content = Content(objects={"run": later.state_dict()})
    save(Writer(run.store, World(), attempt), content, step=10, config=CONFIG)
    assert run.choose("best").step == 5


def test_choose_best_without_a_metric_raises(run):
    run.attempt([5, 10])
    with pytest.raises(ConfigError, match=r"set checkpoint\.metric"):
        run.choose("best")
    run.attempt([15], resumed=(10, 1), accuracy={15: 0.5})
    with pytest.raises(ConfigError, match=r"set checkpoint\.metric"):
        run.choose("best", checkpoint=Checkpoint(metric=None))


@pytest.mark.parametrize("request_", ["5", "best"])
def test_choose_named_step_is_honoured_once(run, request_):
    run.attempt([5, 10, 15], accuracy={5: 0.9, 10: 0.1})
    assert run.choose(request_).step == 5
    run.attempt([7], resumed=(5, 1), resume=request_)
    again = run.choose(request_)  # the same command, after a preemption
    assert (again.step, again.is_named) == (7, False)
    run.attempt([9], resumed=(7, 2), resume=request_)
    assert run.choose(request_).step == 9


def test_choose_named_step_is_repeated_if_the_attempt_never_loaded_it(run):
    run.attempt([5, 10])
    lineage.begin(run.store, {"resume": "5"})  # it died before it had loaded anything
    assert run.choose("5").step == 5


def test_choose_named_step_is_honoured_again_after_another_command(run):
    run.attempt([5, 10])
    run.attempt([7], resumed=(5, 1), resume="5")
    run.attempt([9], resumed=(7, 2), resume="auto")
    assert run.choose("5").step == 5


def test_choose_excludes_the_present_attempt(run):
    run.attempt([5, 10])
    attempt = lineage.begin(run.store, {"resume": "5"})
    run_config = Run(name="a", run_dir=str(run.folder), resume="5")
    lineage.amend(run.store, attempt, {"resumed_from": {"step": 5, "attempt": 1}})
    assert choose(Replicas(run.store), run_config, CONFIG, attempt=attempt.number).is_named
    assert not choose(Replicas(run.store), run_config, CONFIG).is_named  # but the next one does


def test_choose_never_is_honoured_once(run):
    assert run.choose("never") == Start()
    run.attempt([5], resume="never")
    assert run.choose("never").step == 5


# --- another run's checkpoint ------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    run = ARun(tmp_path / "other")
    run.attempt([5, 10])
    return run


@pytest.mark.parametrize(("form", "step"), [
    ("{run}", 10), ("file://{run}", 10), ("{run}/checkpoints/step-00000005.0001", 5),
    ("{run}/checkpoints/step-00000005.0001/", 5),
    ("{run}/checkpoints/step-00000005.0001/manifest.json", 5),
])  # fmt: skip
def test_choose_path_forks_a_checkpoint_of_another_run(run, other, form, step):
    start = run.choose(form.format(run=other.folder))
    assert (start.step, start.is_fork) == (step, True)
    assert start.urls == (str(other.folder),)


def test_choose_fork_accepts_and_returns_differences(run, other):
    start = run.choose(str(other.folder), config=changed(model__hidden=99, name="b"))
    assert [str(difference) for difference in start.differences] == ["model.hidden: 16 -> 99"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_choose_checkpoint_of_another_loop_raises(run, tmp_path):
    folder = tmp_path / "checkpoints/step-00000003.0000"
    dcp.save({"model.w": torch.ones(2)}, storage_writer=PerdureStorageWriter(folder))
    with pytest.raises(ConfigError, match=r"by another loop .* init\.weights="):
        run.choose(str(folder))


def test_choose_fork_with_another_optimizer_raises(run, other):
    config = changed(optimizer___target_="torch.optim.Adam")
    with pytest.raises(
        ConfigError, match=r"torch\.optim\.SGD -> torch\.optim\.Adam.*init\.weights"
    ):
        run.choose(str(other.folder), config=config)


def test_choose_path_is_ignored_once_the_run_has_checkpoints(run, other):
    run.attempt([20], resume=str(other.folder))
    start = run.choose(str(other.folder))
    assert (start.step, start.is_fork) == (20, False)


@pytest.mark.parametrize("path", ["{tmp}", "{tmp}/none", "{run}/checkpoints/step-00000007.0001",
                                  "newest"])  # fmt: skip
def test_choose_path_without_a_checkpoint_raises(tmp_path, run, other, path):
    request_ = path.format(tmp=tmp_path, run=other.folder)
    with pytest.raises(ConfigError) as caught:
        run.choose(request_)
    assert f"resume={request_}: no committed checkpoint there" in str(caught.value)


# --- rejections and the end -------------------------------------------------------------------


def test_choose_state_change_raises_with_differences_and_alternatives(run):
    run.attempt([5])
    with pytest.raises(ConfigError) as caught:
        run.choose(config=changed(model__hidden=99, seed=3, trainer__max_epochs=9))
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  model.hidden: 16 -> 99", "  seed: 0 -> 3"]
    assert "max_epochs" not in str(caught.value)
    assert f"name=… resume={run.folder}\n" in str(caught.value)
    assert "name=… init.weights=<file>" in str(caught.value)


def test_choose_accepts_safe_changes(run):
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
def test_finished_at_the_first_limit(run, limits, done):
    run.attempt([15], accuracy={15: 0.5})
    run_config = Run(name="a", run_dir=str(run.folder), trainer=limits)
    start = choose(Replicas(run.store), run_config, CONFIG)
    assert finished(run_config, start) is done
    assert not finished(run_config, replace(start, is_fork=True))
    assert not finished(run_config, Start())


def test_finished_is_false_without_the_last_evaluation(run):
    run.attempt([15])
    run_config = Run(name="a", run_dir=str(run.folder), trainer=Trainer(max_epochs=1))
    assert not finished(run_config, choose(Replicas(run.store), run_config, CONFIG))


# --- weights alone -----------------------------------------------------------------------------


def test_load_weights_copies_exactly(tmp_path):
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    load_weights(target, Init(weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_load_weights_that_do_not_fit_names_the_tensor(tmp_path):
    save_file(torch.nn.Linear(3, 2, bias=False).state_dict(), tmp_path / "fewer")
    save_file(torch.nn.Linear(4, 2).state_dict(), tmp_path / "wider")
    (tmp_path / "text").write_text("plain text")
    for name, message, text in (
        ("fewer", "does not fit", "bias"),
        ("wider", "does not fit", "weight  shape [2, 4]"),
        ("text", "no safetensors file", ""),
    ):
        with pytest.raises(ConfigError, match=f"init.weights=.*{name}.*{message}") as caught:
            load_weights(torch.nn.Linear(3, 2), Init(weights=str(tmp_path / name)))
        assert text in str(caught.value)


# --- value for a sweeper -----------------------------------------------------------------------


def test_final_value_is_the_best_of_the_metric(run):
    run.attempt([10], accuracy={10: 0.5})
    assert run.final_value("accuracy") == 0.5


def test_final_value_without_metric_is_the_last_evaluation_loss(run):
    state = State(step=10)
    state.evaluated({"loss": 0.25, "accuracy": 0.5}, metric=None, mode="max")
    attempt = lineage.begin(run.store, {"resume": "auto"})
    content = Content(tensors={}, objects={"run": state.state_dict()})
    save(Writer(run.store, World(), attempt), content, step=10, config=CONFIG)
    assert run.final_value(None) == 0.25


def test_final_value_without_evaluation_or_checkpoint_is_none(run):
    assert run.final_value("accuracy") is None
    run.attempt([10])
    assert run.final_value("accuracy") is None
    assert run.final_value(None) is None
