"""Checks of targets before anything is called, and objects built from a configuration."""

# ruff: noqa: UP006, UP007, UP045 (users write these too)

import importlib
import inspect
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from trainer.cluster.world import World
from trainer.config.schema import Checkpoint, Init, Preemption, Run, Sample, Trainer
from trainer.config.targets import accepts, check_target
from trainer.errors import ConfigError, DataError
from trainer.task import Classification
from trainer.tracking.several import Silent
from trainer.training import build

PACKAGE = {
    "__init__.py": "CONSTANT = 3\n",
    "nets.py": '''
        from __future__ import annotations

        from torch import nn


        class Net(nn.Module):
            """Annotations are text, as `from __future__ import annotations` makes them."""

            def __init__(self, width: int, depth: int = 2, scale: float | None = None):
                super().__init__()
                if width < 0:
                    raise ValueError(f"width={width} must not be negative")
                self.lin = nn.Linear(4, width)

            @classmethod
            def small(cls, depth: int) -> Net:
                return cls(1, depth)

            @staticmethod
            def fixed() -> Net:
                return Net(1)

            class Nested:
                def __init__(self, size: int): ...


        def annotated(width: int, other: NotImported = 0):
            return width


        def make(width: int, *, flag: bool = False) -> Net:
            """Make one."""
            return Net(width)


        def anything(**kwargs):
            return kwargs


        def some(width: int, **kwargs):
            return kwargs


        def old_style(width: int = None, names: list = ()):
            return width


        def positional(width, /, depth: int):
            return width, depth


        def drawn():
            import torch

            return torch.rand(6).tolist()


        def buggy(width: int):
            return {}["a bug"]
    ''',
    "fails.py": "raise RuntimeError('my package is broken')\n",
    "leaves.py": "import sys\nsys.exit(3)\n",
    "needs.py": "import a_missing_package\n",
    "deep/__init__.py": "",
    "deep/mod.py": "class Thing:\n    pass\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user package, importable as `mine_build` during a test."""
    write_package(tmp_path / "mine_build", PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "mine_build"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine_build"]:
        del sys.modules[name]


def write_package(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def problems_of(target, provided=0, **arguments):
    problems = check_target({"_target_": target, **arguments}, "model", provided)
    return {problem.key: problem.text for problem in problems}


# --- names of targets --------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "arguments"), [
    ("nets.Net", {"width": 3}),
    ("nets.Net.small", {"depth": 3}),
    ("nets.Net.fixed", {}),
    ("nets.Net.Nested", {"size": 1}),
    ("nets.make", {"width": 3, "flag": True}),
    ("nets.anything", {"other": "value", "_x": 1}),
    ("deep.mod.Thing", {}),
])  # fmt: skip
def test_check_target_accepts_classes_methods_and_functions(package, target, arguments):
    assert problems_of(f"{package}.{target}", **arguments) == {}


@pytest.mark.parametrize(("target", "text"), [
    ("a_missing_package.Net", "no such module 'a_missing_package'"),
    ("Net", "no such module 'Net'; give the dotted name"),
    ("", "'' is not a dotted name"),
    (".nets.Net", "'.nets.Net' is not a dotted name"),
    ("torch..nn", "'torch..nn' is not a dotted name"),
    ("torch.optim.Adm", "torch.optim has no 'Adm' (did you mean 'Adam'?)"),
    ("mine_build.nets.Nt", "mine_build.nets has no 'Nt' (did you mean 'Net'?)"),
    ("mine_build.nets.Net.smal", "mine_build.nets has no 'smal' (did you mean 'small'?)"),
    ("mine_build.net.Net", "mine_build has no 'net' (did you mean 'nets'?)"),
    ("mine_build.deep.mud.Thing", "mine_build.deep has no 'mud' (did you mean 'mod'?)"),
    ("mine_build.CONSTANT", "is a int, not a class or function"),
    ("mine_build.nets", "is a module, not a class or function"),
    ("mine_build.fails.Net", "cannot be imported: RuntimeError: my package is broken"),
    ("mine_build.leaves.Net", "cannot be imported: SystemExit: 3"),
    ("mine_build.needs.Net", "cannot be imported: No module named 'a_missing_package'"),
])  # fmt: skip
def test_check_target_unknown_name_suggests_the_closest(package, target, text):
    problems = problems_of(target)
    assert list(problems) == ["model._target_"]
    assert text in problems["model._target_"]


def test_check_target_reports_a_user_folder_that_hides_models(tmp_path, monkeypatch):
    modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "models"}
    write_package(tmp_path / "models", {"__init__.py": ""})
    monkeypatch.syspath_prepend(tmp_path)
    for name in modules:
        monkeypatch.delitem(sys.modules, name)
    finders = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
    monkeypatch.setattr(sys, "meta_path", finders)  # as in a regular installation
    importlib.invalidate_caches()
    try:
        problems = problems_of("models.mlp.MLP")
    finally:
        sys.modules.pop("models", None)
    assert (
        f"'models' is imported from {tmp_path / 'models'}, which hides"
        in problems["model._target_"]
    )
    assert "rename that folder" in problems["model._target_"]


def test_check_target_typo_in_models_is_not_reported_as_hidden():
    problems = problems_of("models.mpl.MLP")
    assert "did you mean 'mlp'?" in problems["model._target_"]
    assert "hides" not in problems["model._target_"]


@pytest.mark.parametrize("node", [None, 3, "mine.Net", [], {}, {"width": 3}])
def test_check_target_node_without_target_is_a_problem(node):
    (problem,) = check_target(node, "tracker.x")
    assert problem.key == "tracker.x"
    assert "has no _target_" in problem.text


# --- arguments ---------------------------------------------------------------------------------


def test_check_target_reports_unknown_missing_and_wrong_arguments_by_key(package):
    problems = problems_of(f"{package}.nets.Net", depht=3, scale="big")
    assert problems == {
        "model.depht": f"{package}.nets.Net has no argument 'depht' (did you mean 'depth'?)",
        "model.scale": "'big' is not float | None",
        "model.width": f"{package}.nets.Net needs this argument",
    }


@pytest.mark.parametrize(("value", "text"), [("a", "'a'"), (1.5, "1.5"), (True, "True")])
def test_check_target_evaluates_string_annotations(package, value, text):
    problems = problems_of(f"{package}.nets.make", width=value)
    assert problems == {"model.width": f"{text} is not int"}


def test_check_target_unknown_annotation_accepts_anything(package):
    assert problems_of(f"{package}.nets.annotated", width="x", other=[{}]) == {}


def test_check_target_with_kwargs_accepts_unknown_names_and_checks_the_others(package):
    assert problems_of(f"{package}.nets.some", width=3, x=1) == {}
    assert set(problems_of(f"{package}.nets.some", x=1)) == {"model.width"}
    assert set(problems_of(f"{package}.nets.some", width="3")) == {"model.width"}


def test_check_target_provided_arguments_are_neither_missing_nor_valid():
    assert problems_of("torch.optim.SGD", provided=1, lr=0.1) == {}
    problems = problems_of("torch.optim.SGD", provided=1, params=[1])
    assert "has no argument 'params'" in problems["model.params"]
    assert "params" not in problems["model.params"].partition("valid:")[2]


def test_check_target_positional_only_parameters_are_provided_first(package):
    assert problems_of(f"{package}.nets.positional", provided=1, depth=3) == {}
    assert set(problems_of(f"{package}.nets.positional", provided=1)) == {"model.depth"}


def test_check_target_counts_hydra_args_list():
    assert problems_of("torch.nn.Linear", _args_=[3, 4]) == {}
    assert set(problems_of("torch.nn.Linear", _args_=[3])) == {"model.out_features"}


def test_check_target_partial_may_omit_arguments_only():
    assert problems_of("torch.optim.Adam", _partial_=True, lr=0.1) == {}
    problems = problems_of("torch.optim.Adam", _partial_=True, lrr=0.1, betas=[0.9])
    assert set(problems) == {"model.lrr", "model.betas"}


def test_check_target_misspelt_hydra_key_is_a_problem():
    assert set(problems_of("torch.nn.ReLU", _patial_=True)) == {"model._patial_"}
    assert problems_of("torch.nn.ReLU", _convert_="all", _recursive_=False) == {}


def test_check_target_accepts_null_if_it_is_the_default(package):
    assert problems_of(f"{package}.nets.old_style", width=None) == {}
    assert set(problems_of(f"{package}.nets.make", width=None)) == {"model.width"}


def test_check_target_checks_nested_targets(package):
    problems = problems_of(
        f"{package}.nets.anything",
        a={"_target_": "torch.nn.Linear", "in_features": "x", "out_features": 1},
        b=[{"c": {"_target_": "torch.nn.Nope"}}, {"_target_": "torch.nn.ReLU", "inplac": True}],
        d={"plain": [1, 2]},
        _args_=[{"_target_": "torch.nn.Nope"}],
    )
    assert set(problems) == {
        "model.a.in_features", "model.b[0].c._target_", "model.b[1].inplac",
        "model._args_[0]._target_",
    }  # fmt: skip


def test_check_target_without_a_signature_accepts_any_argument():
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(dict)
    assert problems_of("builtins.dict", anything=1) == {}


@pytest.mark.parametrize(("annotation", "yes", "no"), [
    (int, [0, -3], [1.0, True, "1", None, [1]]),
    (float, [1, 1.5, -2], [True, "x", "1e-3", None]),
    (bool, [True, False], [0, 1, "true", None]),
    (str, ["", "a"], [1, None, ["a"]]),
    (type(None), [None], [0, ""]),
    (int | None, [None, 1], ["x", 1.5]),
    (typing.Optional[int], [None, 1], ["x", 1.5]),
    (typing.Union[int, str], [1, "x"], [[1], None]),
    (float | Tensor, [1.0, 3], ["x", "1e-3"]),
    (float | Literal["auto"], [1.0, "auto"], ["x"]),
    (list[int], [[], [1, 2]], [["a"], [1.5], 3, "ab"]),
    (Sequence[str], [["a"]], ["ab", [1]]),
    (typing.List[int], [[1]], [["a"], 3]),
    (typing.List, [[1], ["a"]], [3]),
    (typing.Tuple, [[1], []], [3]),
    (set[int], [[1]], [["a"], 1]),
    (list[list[int]], [[[1], []]], [[1], [["a"]]]),
    (tuple[float, float], [[0.9, 1]], [[0.9], [0.9, 1, 2], ["a", 1], 3]),
    (tuple[int, ...], [[], [1, 2, 3]], [["a"], 1]),
    (str | Sequence[str], ["a", ["a"]], [3, [3]]),
    (Literal["a", "b"], ["a"], ["c", 1]),
    (Any, [1, "a", None, [1]], []),
    (inspect.Parameter.empty, [1, "a", None], []),
    (Path, ["a/b"], []),  # in doubt, yes: the callee may convert a string
    (torch.device, ["cpu"], []),
    (Callable, ["relu"], []),
    (Iterable[int], [[1]], []),
    (Mapping[str, int], [{"a": 1}], []),
    (typing.TypeVar("T"), [1, "a"], []),
    (int, [{"_target_": "makes.an.Int"}], []),
])  # fmt: skip
def test_accepts_matches_yaml_values_to_annotations(annotation, yes, no):
    assert [value for value in yes if not accepts(annotation, value)] == []
    assert [value for value in no if accepts(annotation, value)] == []


# --- complete configurations ------------------------------------------------------------------


def a_run(**changes):
    groups = {
        "model": {"_target_": "models.mlp.MLP", "input_shape": [4], "hidden": [3], "classes": 3},
        "data": {
            "_target_": "trainer.data.synthetic.Synthetic", "shape": [4], "classes": 3,
            "train_samples": 20, "eval_samples": 7,
        },
        "task": {"_target_": "trainer.task.Classification"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "sample": Sample(shape=[4], classes=3),
        "trainer": Trainer(max_epochs=3, global_batch_size=6),
    }  # fmt: skip
    return Run(**{"name": "a", "run_dir": "a", **groups, **changes})


def keys(run):
    return [problem.key for problem in build.check(run)]


def test_check_valid_configuration_has_no_problems():
    assert build.check(a_run()) == []


def test_check_covers_every_group():
    run = a_run(
        model={"_target_": "models.mlp.MLP", "hiden": [3]},
        data={"_target_": "trainer.data.synthetic.Synthetic"},
        task={"_target_": "trainer.task.Classification", "label_smoothing": "x"},
        optimizer={"_target_": "torch.optim.SGD", "learning_rate": 0.1},
        scheduler={"_target_": "torch.optim.lr_scheduler.StepLR", "interval": "epoch"},
        tracker={"mine": {"_target_": "mine.Tracker"}, "none": None},
        init=Init(weights="/nowhere/at/all"),
        preemption=Preemption(signals=["SIGTERM", "SIGTREM", "SIGKILL"]),
    )
    assert keys(run) == [
        "model.hiden", "data.shape", "task.label_smoothing", "optimizer.learning_rate",
        "scheduler.step_size", "tracker.mine._target_", "tracker.none", "init.weights",
        "preemption.signals", "preemption.signals",
    ]  # fmt: skip


def test_check_rejects_an_optimizer_that_needs_a_closure_by_name():
    (problem,) = build.check(a_run(optimizer={"_target_": "torch.optim.LBFGS", "lr": 0.5}))
    assert problem.key == "optimizer._target_"
    assert "LBFGS.step needs the argument 'closure'" in problem.text


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Rprop"])
def test_check_accepts_optimizers_whose_closure_is_optional(name):
    assert build.check(a_run(optimizer={"_target_": f"torch.optim.{name}", "lr": 0.5})) == []


@pytest.mark.parametrize("word", ["total_steps", "total_epochs", "steps_per_epoch"])
def test_check_accepts_horizon_words_in_schedulers_only(word):
    scheduler = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": word}
    assert build.check(a_run(scheduler=scheduler)) == []
    scheduler = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": "never"}
    assert keys(a_run(scheduler=scheduler)) == ["scheduler.step_size"]
    smoothing = {"_target_": "trainer.task.Classification", "label_smoothing": word}
    assert keys(a_run(task=smoothing)) == ["task.label_smoothing"]


def make_job(run, world=None):
    world = world or World()
    return build.build_job(run, world, build.build_data(run), Silent())


@pytest.mark.parametrize(("limits", "steps"), [
    (Trainer(max_epochs=3, global_batch_size=6), 9),
    (Trainer(max_epochs=3, max_steps=4, global_batch_size=6), 4),
    (Trainer(max_epochs=None, max_steps=40, global_batch_size=6), 40),
    (Trainer(max_epochs=1, max_steps=4, global_batch_size=6), 3),
])  # fmt: skip
def test_build_job_max_steps_is_the_first_limit(limits, steps):
    assert make_job(a_run(trainer=limits)).max_steps == steps


def test_build_job_replaces_horizon_words_by_the_run_length():
    scheduler = {
        "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total_epochs",
        "interval": "epoch",
    }  # fmt: skip
    limits = Trainer(max_epochs=None, max_steps=10, global_batch_size=6)
    job = make_job(a_run(scheduler=scheduler, trainer=limits))
    assert job.phases[0].scheduler.T_max == 4  # 10 steps, 3 per epoch
    assert job.scheduler_interval == "epoch"
    job = make_job(a_run(scheduler={**scheduler, "T_max": "steps_per_epoch"}))
    assert job.phases[0].scheduler.T_max == 3
    job = make_job(a_run(scheduler={**scheduler, "T_max": "total_steps"}))
    assert job.phases[0].scheduler.T_max == 9


def test_build_model_weights_depend_on_the_seed():
    first, same = build.build_model(a_run()), build.build_model(a_run())
    other = build.build_model(a_run(seed=1))
    assert all(map(torch.equal, first.parameters(), same.parameters()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))


def test_build_job_eval_batch_size_defaults_to_the_microbatch():
    assert make_job(a_run()).evaluation.batch_size == 6
    limits = Trainer(global_batch_size=6, accumulate=3)
    assert make_job(a_run(trainer=limits)).evaluation.batch_size == 2
    limits = Trainer(global_batch_size=6, eval_batch_size=50)
    assert make_job(a_run(trainer=limits)).evaluation.batch_size == 50


def test_build_job_excludes_frozen_parameters_from_the_optimizer(package, tmp_path):
    write_package(tmp_path / package, {
        "frozen.py": """
            from models.mlp import MLP


            def make():
                model = MLP((4,), (3,), 3)
                model.layers[1].weight.requires_grad_(False)
                return model
        """
    })  # fmt: skip
    job = make_job(a_run(model={"_target_": f"{package}.frozen.make"}))
    assert [len(group["params"]) for group in job.phases[0].optimizer.param_groups] == [3]


def test_build_data_plain_dataset_has_no_evaluation():
    data = {"_target_": "trainer.data.synthetic.Synthetic", "shape": [4], "train_samples": 20}
    train = build.build_data(a_run(data=data)).train
    plain = {"_target_": "torch.utils.data.Subset", "dataset": train, "indices": [0, 1, 2]}
    source = build.build_data(a_run(data=plain))
    assert len(source.train) == 3
    assert source.eval is None


def test_build_data_recognises_a_source_without_loading_it(package, tmp_path):
    write_package(tmp_path / package, {
        "lazy.py": """
            class Lazy:
                loaded = []

                @property
                def train(self):
                    self.loaded.append("train")
                    return [1]

                @property
                def eval(self):
                    raise AssertionError("must not be read")
        """
    })  # fmt: skip
    source = build.build_data(a_run(data={"_target_": f"{package}.lazy.Lazy"}))
    assert type(source).__name__ == "Lazy"


# --- errors of targets ------------------------------------------------------------------------


def test_build_model_value_error_of_a_target_is_a_config_error(package):
    with pytest.raises(ConfigError, match=r"Net rejected its arguments: width=-1 must not"):
        build.build_model(a_run(model={"_target_": f"{package}.nets.Net", "width": -1}))


def test_build_model_other_exception_of_a_target_is_raised_unchanged(package):
    with pytest.raises(KeyError, match="a bug"):
        build.build_model(a_run(model={"_target_": f"{package}.nets.buggy", "width": 1}))


def test_build_data_error_of_a_source_is_raised_unchanged(tmp_path):
    data = {"_target_": "trainer.data.mnist.Mnist", "dir": str(tmp_path / "none")}
    with pytest.raises(DataError, match="no such directory"):
        build.build_data(a_run(data=data))


def test_build_model_not_a_module_raises(package):
    with pytest.raises(ConfigError, match=r"returns a dict, not a torch\.nn\.Module"):
        build.build_model(a_run(model={"_target_": f"{package}.nets.anything"}))


def test_build_data_without_length_raises(package):
    with pytest.raises(DataError, match="without a length"):
        build.build_data(a_run(data={"_target_": "builtins.iter", "_args_": [[1]]}))


def a_stream(**settings):
    data = {"_target_": "torch.utils.data.DataLoader", "dataset": [1, 2, 3]}
    return a_run(data=data, **settings)


def test_build_data_stream_requires_max_steps():
    with pytest.raises(ConfigError, match=r"is a stream of unknown length; set trainer\.max_steps"):
        build.build_data(a_stream())
    job = make_job(a_stream(trainer=Trainer(max_steps=7, max_epochs=2, global_batch_size=1)))
    assert (job.max_steps, job.max_epochs, job.data.steps_per_epoch) == (7, 2, None)
    job = make_job(a_run(trainer=Trainer(max_epochs=2, global_batch_size=5)))
    assert job.max_steps == 2 * job.data.steps_per_epoch


@pytest.mark.parametrize("word", ["total_epochs", "steps_per_epoch"])
def test_build_data_stream_with_epoch_based_schedule_raises(word):
    scheduler = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": word}
    with pytest.raises(ConfigError, match=rf"scheduler\.step_size={word} cannot be computed"):
        build.build_data(a_stream(scheduler=scheduler, trainer=Trainer(max_steps=7)))
    scheduler["step_size"] = "total_steps"
    build.build_data(a_stream(scheduler=scheduler, trainer=Trainer(max_steps=7)))


def test_build_job_stream_as_evaluation_data_raises():
    part = {"_target_": "torch.utils.data.DataLoader", "dataset": [1, 2, 3]}
    data = {"_target_": "trainer.data.source.Datasets", "train": [1], "eval": part}
    settings = Trainer(max_steps=7, global_batch_size=1)
    for train in ([1, 2], part):
        with pytest.raises(DataError, match="has a stream as evaluation data"):
            make_job(a_run(data={**data, "train": train}, trainer=settings))


def test_build_job_empty_evaluation_data_raises():
    data = {"_target_": "trainer.data.source.Datasets", "train": [1, 2], "eval": []}
    with pytest.raises(DataError, match="has empty evaluation data"):
        make_job(a_run(data=data, trainer=Trainer(max_steps=7, global_batch_size=1)))


@pytest.mark.parametrize(("change", "text"), [
    ({"trainer": Trainer(max_steps=7, global_batch_size=1, patience_evals=2)}, "patience_evals"),
    ({"checkpoint": Checkpoint(metric="loss")}, "checkpoint.metric needs an evaluation"),
    ({"scheduler": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}}, "ReduceLROnPl"),
])  # fmt: skip
def test_build_job_setting_that_needs_an_evaluation_raises_without_one(change, text):
    settings = {
        "data": {"_target_": "trainer.data.source.Datasets", "train": [1, 2], "eval": None},
        "trainer": Trainer(max_steps=7, global_batch_size=1),
    }
    with pytest.raises(ConfigError, match=text):
        make_job(a_run(**{**settings, **change}))
    assert make_job(a_run(**settings)).evaluation is None


def test_classification_loss_with_unknown_labels_names_the_number_of_classes():
    for labels, text in (
        ([0, 5, 1], r"from 0 to 5, .* 0 … 2; set sample\.classes=6"),
        ([0, -1, 1], r"from -1 to 1, .* 0 … 2; change the data"),
    ):
        with pytest.raises(ConfigError, match=text):
            Classification().loss(nn.Linear(4, 3), (torch.zeros(3, 4), torch.tensor(labels)))


def test_build_data_random_numbers_depend_on_the_seed(package):
    run = a_run(data={"_target_": f"{package}.nets.drawn"})
    first = build.build_data(run).train
    torch.manual_seed(5)
    assert build.build_data(run).train == first
    assert build.build_data(a_run(data=run.data, seed=1)).train != first


def test_build_job_wrong_sample_shape_names_the_right_one():
    with pytest.raises(ConfigError, match=r"set sample\.shape=\[4\]"):
        make_job(a_run(sample=Sample(shape=[5], classes=3)))


def test_build_job_global_batch_larger_than_the_data_raises():
    with pytest.raises(DataError, match="20 samples, fewer than one global batch of 21"):
        make_job(a_run(trainer=Trainer(global_batch_size=21)))


def test_build_tracker_on_other_ranks_is_silent():
    run = a_run(tracker={"x": {"_target_": "trainer.tracking.several.Several", "trackers": []}})
    assert isinstance(build.build_tracker(run, World(rank=1, size=2)), Silent)
    assert not isinstance(build.build_tracker(run, World()), Silent)


def test_build_job_accepts_a_user_module(package):
    model = {"_target_": f"{package}.nets.make", "width": 3}
    job = make_job(a_run(model=model))
    assert isinstance(job.model, nn.Module)
    assert job.phases[0].wrapped is job.model  # one rank needs no wrapper


def test_build_tracker_constructor_failure_is_a_config_error(package, tmp_path):
    write_package(tmp_path / package, {
        "broken.py": """
            class Broken:
                def __init__(self):
                    raise RuntimeError("no connection")
        """
    })  # fmt: skip
    run = a_run(tracker={"mine": {"_target_": f"{package}.broken.Broken"}})
    text = rf"tracker\.mine: cannot create {package}\.broken\.Broken: RuntimeError: no connection"
    with pytest.raises(ConfigError, match=text):
        build.build_tracker(run, World())
