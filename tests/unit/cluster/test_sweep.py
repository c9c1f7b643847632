"""Sweeps of the command, in this process; each job saves a checkpoint instead of training."""

import importlib
import json
import os
import pickle
import tempfile

import pytest
from hydra.core.plugins import Plugins
from hypothesis import example, given
from hypothesis import strategies as st

from trainer import run
from trainer.checkpoint import Writer, lineage, save
from trainer.checkpoint.state_tree import Content
from trainer.cluster.sweep import JobFailedError, job_name
from trainer.cluster.world import World
from trainer.core.scratch import user_folder
from trainer.core.state import State
from trainer.errors import ConfigError, PerdureError, problems_text
from trainer.storage import open_store

ASK = """
import json
from pathlib import Path
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

class Ask(Sweeper):
    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config)
    def sweep(self, arguments):
        jobs = [[*arguments, f"++optimizer.lr={lr}"] for lr in (0.5, 0.25)]
        values = [job.return_value for job in self.launcher.launch(jobs, 0)]
        Path("values.json").write_text(json.dumps(values))

node = {"_target_": f"{__name__}.Ask"}
ConfigStore.instance().store(group="hydra/sweeper", name="ask", node=node)
"""


def save_result(run_dir, metrics, metric):
    """Save what a job of one step and one evaluation leaves in its run directory."""
    state, store = State(step=1), open_store(run_dir)
    state.evaluated(metrics, metric=metric, mode="max")
    writer = Writer(store, World(), lineage.begin(store, {}))
    save(writer, Content(objects={"run": state.state_dict()}), step=1, config={})


@pytest.fixture
def run_sweep(tmp_path, monkeypatch):
    """Run the command in an empty folder; return the exit code and the jobs.

    `metrics` are the results of each job's evaluation; a job without them saves nothing.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trainer.run"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def start(*arguments, codes=(), metrics=()):
        jobs, remaining, results = [], list(codes), list(metrics)

        def run_one(composed, problems, **_):
            jobs.append((composed.name, composed.run_dir, problems))
            if problems:
                return 2
            if results and (values := results.pop(0)):
                save_result(composed.run_dir, values, composed.checkpoint.metric)
            return remaining.pop(0) if remaining else 0

        monkeypatch.setattr(run, "_run_one", run_one)
        return run._command(list(arguments)), jobs

    return start


def write_grid(folder, text):
    (folder / "c" / "experiment").mkdir(parents=True)
    (folder / "c" / "experiment" / "grid.yaml").write_text(
        f"# @package _global_\nname: grid\n{text}"
    )
    return ["--config-dir", "c", "experiment=grid"]


def names(jobs):
    return [name for name, _, _ in jobs]


def keys(jobs):
    return [[problem.key for problem in problems] for _, _, problems in jobs]


def test_sweep_in_a_file_names_each_job(tmp_path, run_sweep):
    mine = write_grid(
        tmp_path, "hydra: {mode: MULTIRUN, sweeper: {params: {trainer.max_epochs: '1,2', seed: 5}}}"
    )
    code, jobs = run_sweep(*mine)
    assert code == 0
    assert jobs == [
        (f"grid-trainer.max_epochs={n}-seed=5", f"runs/grid-trainer.max_epochs={n}-seed=5", [])
        for n in (1, 2)
    ]


def test_files_of_hydra_are_in_the_folder_of_the_user(tmp_path, run_sweep):
    assert run_sweep("-m", "name=a", "seed=1,2")[0] == 0
    assert (user_folder() / "multirun/multirun.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]


def test_sweep_on_the_command_line_keeps_fixed_values_out_of_the_name(run_sweep):
    _, jobs = run_sweep("-m", "name=a", "seed=1,2", "data.mean=0.10", "~tracker", "+model.x='y'")
    assert names(jobs) == ["a-seed=1", "a-seed=2"]


def test_sweep_over_a_key_that_is_also_fixed_names_each_job(run_sweep):
    _, jobs = run_sweep("-m", "name=a", "seed=1", "seed=1,2")
    assert names(jobs) == ["a-seed=1", "a-seed=2"]


def test_sweep_over_files_and_arguments_has_both_in_the_name(tmp_path, run_sweep):
    mine = write_grid(tmp_path, "hydra: {sweeper: {params: {seed: '1,2'}}}")
    _, jobs = run_sweep(*mine, "-m", "model=cnn,mlp")
    assert sorted(names(jobs)) == [
        f"grid-seed={seed}-model={model}" for seed in (1, 2) for model in ("cnn", "mlp")
    ]


@pytest.mark.parametrize(("metric", "value"), [("accuracy", 0.75), ("null", 0.5)])
def test_other_sweeper_gets_the_value_and_its_jobs_have_own_names(
    tmp_path, run_sweep, monkeypatch, metric, value
):
    (tmp_path / "hydra_plugins" / "ask").mkdir(parents=True)
    (tmp_path / "hydra_plugins" / "ask" / "__init__.py").write_text("")
    (tmp_path / "hydra_plugins" / "ask" / "ask.py").write_text(ASK)
    monkeypatch.syspath_prepend(tmp_path)
    Plugins.instance().register(importlib.import_module("hydra_plugins.ask.ask").Ask)
    arguments = ["-m", "hydra/sweeper=ask", "name=a", "seed=3", f"checkpoint.metric={metric}"]
    metrics = [{"loss": 0.5, "accuracy": 0.75}, None]
    code, jobs = run_sweep(*arguments, metrics=metrics)
    assert code == 0
    assert names(jobs) == ["a-optimizer.lr=0.5", "a-optimizer.lr=0.25"]
    assert json.loads((tmp_path / "values.json").read_text()) == [value, None]


def test_failing_job_fails_the_sweep_and_others_run(run_sweep):
    code, jobs = run_sweep("-m", "name=a", "seed=1,2,3", codes=[0, 76, 0])
    assert (code, len(jobs)) == (76, 3)


def test_preempted_job_ends_the_sweep(run_sweep):
    with pytest.raises(SystemExit) as ended:
        run_sweep("-m", "name=a", "seed=1,2", codes=[75])
    assert ended.value.code == 75


@pytest.mark.parametrize("fixed", ["run_dir=x", "run_dir='${oc.env:HOME}/x'"])
def test_sweep_with_one_fixed_run_dir_is_rejected(run_sweep, fixed):
    code, jobs = run_sweep("-m", "seed=1,2", fixed)
    assert code == 2
    assert keys(jobs) == [["run_dir"], ["run_dir"]]


def test_sweep_whose_run_dirs_turn_out_equal_is_rejected(run_sweep):
    code, jobs = run_sweep("-m", "seed=1,2", "run_dir='x/${model._target_}'")
    assert code == 2
    assert keys(jobs) == [[], ["run_dir"]]


@pytest.mark.parametrize("run_dirs", ["run_dir=x,y", "run_dir='x-${seed}'", "run_dir='r/${name}'"])
def test_sweep_with_own_run_dirs_runs(run_sweep, run_dirs):
    code, jobs = run_sweep("-m", "seed=1,2" if "," not in run_dirs else "name=a", run_dirs)
    assert code == 0
    assert len({run_dir for _, run_dir, _ in jobs}) == len(jobs) == 2


def test_failure_in_another_process_keeps_its_code():
    error = pickle.loads(pickle.dumps(JobFailedError(76)))
    assert isinstance(error, PerdureError)
    assert (error.exit_code, str(error)) == (76, "a job of the sweep exited with 76; see its log")


@pytest.mark.parametrize("launcher", ["submitit_local", "basic"])
def test_launchers_of_plugins_are_accepted(run_sweep, launcher):
    with pytest.raises(ConfigError, match="no_such_launcher"):
        run_sweep("-m", "hydra/launcher=no_such_launcher", "seed=1,2")
    code, _ = run_sweep("--cfg", "job", f"hydra/launcher={launcher}")
    assert code == 0


PARTS = st.lists(st.text(min_size=1, max_size=90).map(lambda text: f"key={text}"), max_size=6)
LONG = [f"key={digit * 90}" for digit in "123"]


@example("n" * 255, ["seed=1"], ["seed=2"])
@example("É" * 100, [*LONG, "seed=1"], [*LONG, "seed=2"])
@given(st.text("nÉ漢", min_size=1, max_size=255), PARTS, PARTS)
def test_job_name_fits_a_directory_and_tells_jobs_apart(name, one, other):
    first, second = job_name(name, one), job_name(name, other)
    limit = os.pathconf("/tmp", "PC_NAME_MAX")
    assert len(os.fsencode(first)) <= limit == 255
    assert (first == second) == (one == other) or not one or not other


def test_short_job_names_are_unchanged():
    assert job_name("a/b", ["seed=1", "optimizer.betas=[0.9,0.99]"]).startswith(
        "a.b-seed=1-optimizer.betas=0.9,0.99-"
    )


def test_problems_of_a_fixed_run_dir_name_the_way_out(run_sweep):
    _, jobs = run_sweep("-m", "seed=1,2", "run_dir=x")
    text = problems_text(jobs[0][2])
    assert "'x' is the same for several jobs of the sweep; use run_dir='x/${name}'" in text
