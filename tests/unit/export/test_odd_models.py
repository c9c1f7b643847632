"""Models that some formats cannot export: errors name the line and a format that works."""

import numpy as np
import pytest
import torch
from support.trained_runs import a_trained_run

from trainer.data.digits import Digits
from trainer.errors import ConfigError
from trainer.export.__main__ import main
from trainer.export.calls import call_of
from trainer.export.exported_model import Choices
from trainer.export.exporting import export
from trainer.export.formats import open_export
from trainer.export.samples import random_inputs


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A cached function that saves a run with a model of export_models."""
    runs = {}

    def make(name, *overrides):
        if name not in runs:
            runs[name] = a_trained_run(
                tmp_path_factory.mktemp(name), "data=digits",
                "~model.input_shape", "~model.classes",
                f"model._target_=support.export_models.{name}", *overrides, steps=0,
            )  # fmt: skip
        return runs[name]

    return make


DECIDES = ("control flow depends on a tensor value here", "format=torchscript method=script")


@pytest.mark.parametrize(("name", "arguments", "texts"), [
    ("Branches", ["format=torch_export"], ["if x.sum() > 0", "export_models.py", *DECIDES]),
    ("Branches", ["format=torchscript", "method=trace"],
     ["if x.sum() > 0", "export_models.py, line", "a trace would fix"]),
    ("Counts", ["format=torch_export"], ["count = int(x", *DECIDES]),
    ("Exotic", ["format=onnx"], ["ONNX has no operator for aten.linalg_eig", "torch_export"]),
    ("Fixed", ["format=torch_export"], ["the size of axis 'batch' is fixed to 3", "dynamic="]),
    ("Chance", ["format=torchscript"], ["differs between two calls", "training=self.training"]),
    ("Unscriptable", ["format=torchscript", "method=script"],
     ["keyword-only", "forward(self, x: Tensor, **rest", "method=trace"]),
    ("HalfScriptable", ["format=torchscript"],
     ["if float(y.sum()) > 0", "cannot be scripted either", "traced="]),
])  # fmt: skip
def test_unsupported_model_error_names_the_line_and_an_alternative(
    run_of, capsys, tmp_path, name, arguments, texts
):
    if "format=onnx" in arguments:
        pytest.importorskip("onnxscript")
    out = f"out={tmp_path}/a"
    assert main([run_of(name), *arguments, "allow=support.export_models", out]) == 1
    error = capsys.readouterr().err
    for text in texts:
        assert text in error
    assert len(error.splitlines()) <= 14
    assert list(tmp_path.iterdir()) == []


IMAGES = Digits().eval.tensors[0][:4]


@pytest.mark.parametrize(("name", "form", "options"), [
    ("Branches", "torchscript", {}),
    ("Counts", "torchscript", {"method": "script"}),
    ("Exotic", "torchscript", {}),
    ("Fixed", "torchscript", {}),
    ("Unscriptable", "torchscript", {}),
    ("HalfScriptable", "torchscript", {"traced": "submodule"}),
    ("HalfScriptable", "full_model", {}),
    ("Tied", "torchscript", {"freeze": "true"}),
    ("Tied", "torch_export", {}),
    ("Normalized", "torchscript", {}),
    ("Normalized", "torch_export", {}),
])  # fmt: skip
def test_supported_model_export_returns_the_outputs_of_its_class(
    run_of, tmp_path, name, form, options
):
    from support import export_models

    run, allowed = run_of(name), Choices(allowed=["support.export_models"])
    done = export(run, form, out=f"{tmp_path}/a", choices=allowed, options=options)
    model = getattr(export_models, name)().eval()
    weights = export(run, "state_dict", out=f"{tmp_path}/w.pt").path
    model.load_state_dict(torch.load(weights, weights_only=True))
    runner = open_export(done.path, trusted=True)
    for sign in (1, -1):  # both branches
        with torch.no_grad():
            expected = model(sign * IMAGES)
        (outputs,) = runner.run({"x": (sign * IMAGES).numpy()}).values()
        np.testing.assert_allclose(outputs, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("part", "names"), [
    ("", "(body.1, body.2)"), ("body", "(1, 2)"), ("body.2", "(the model itself)"),
])  # fmt: skip
def test_full_model_with_parametrized_modules_is_rejected_in_one_sentence(
    run_of, capsys, tmp_path, part, names
):
    arguments = ["format=full_model", f"part={part}", "allow=support.export_models"]
    inputs = [] if part != "body.2" else ["inputs=input:float32[16]"]
    out = f"out={tmp_path}/a"
    assert main([run_of("Normalized"), *arguments, *inputs, out]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert f"torch does not pickle parametrized modules {names}; use format=torch_export" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["torchscript", "torch_export", "full_model"])
def test_nested_inputs_and_outputs_are_named(run_of, tmp_path, form):
    from support.export_models import FromDict

    run = run_of("FromDict", "task._target_=support.export_models.DictTask")
    allowed = Choices(allowed=["support.export_models"])
    done = export(run, form, out=f"{tmp_path}/a", choices=allowed)
    model = FromDict().eval()
    weights = export(run, "state_dict", out=f"{tmp_path}/w.pt").path
    model.load_state_dict(torch.load(weights, weights_only=True))
    bias = torch.arange(4.0)
    with torch.no_grad():
        expected = model({"image": IMAGES, "bias": bias}, scale=2.0)
    runner = open_export(done.path, trusted=True)
    assert runner.inputs == ["image", "bias"]
    outputs = runner.run({"bias": bias.numpy(), "image": IMAGES.numpy()})
    assert list(outputs) == ["logits", "rest_0", "rest_1"]
    for value, tensor in zip(outputs.values(), (expected.logits, *expected.rest), strict=True):
        np.testing.assert_allclose(value, tensor.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["torchscript", "full_model"])
def test_two_inputs_and_a_tuple_output_are_named(run_of, tmp_path, form):
    choices = Choices(allowed=["support.export_models"], inputs="a:float32[1,8,8];b:float32[1,8,8]")
    done = export(run_of("Pair"), form, out=f"{tmp_path}/a", choices=choices)
    assert [item["name"] for item in done.record["inputs"]] == ["a", "b"]
    assert [item["shape"] for item in done.record["outputs"]] == [["batch", 10], ["batch"]]
    outputs = open_export(done.path, trusted=True).run({"a": IMAGES.numpy(), "b": IMAGES.numpy()})
    np.testing.assert_allclose(outputs["output_1"], IMAGES.mean((1, 2, 3)).numpy(), rtol=1e-5)


def test_output_with_the_name_of_an_input_is_renamed(run_of, tmp_path):
    choices = Choices(allowed=["support.export_models"])
    done = export(run_of("Named"), "torch_export", out=f"{tmp_path}/a", choices=choices)
    outputs = open_export(done.path).run({"x": IMAGES.numpy()})
    assert list(outputs) == ["logits", "x_out"]
    np.testing.assert_array_equal(outputs["x_out"], 2 * IMAGES.numpy())


def test_model_without_tensor_output_exits_2(run_of, capsys):
    assert main([run_of("NoTensor"), "format=torchscript", "allow=support.export_models"]) == 2
    assert "returns a str without tensors" in capsys.readouterr().err


# --- tensor names -----------------------------------------------------------------------------


class Any(torch.nn.Module):
    def forward(self, first, *others, flag=True, **rest):
        return first


ONE, TWO = torch.zeros(2, 3), torch.ones(2)


@pytest.mark.parametrize(("arguments", "keywords", "names"), [
    ((ONE,), {}, ["first"]),
    ((ONE, TWO, TWO), {"flag": False}, ["first", "others_0", "others_1"]),
    (({"a.b": ONE, "c": [TWO, None]},), {}, ["a_b", "c_0"]),
    (({"a": ONE}, {"a": TWO}), {}, ["first_a", "others_0_a"]),
    ((ONE,), {"mask": TWO, "x": 3}, ["first", "mask"]),
])  # fmt: skip
def test_call_names_tensors_after_parameters(arguments, keywords, names):
    call = call_of(Any(), arguments, keywords)
    assert list(call.tensors()) == names
    other = [tensor + 5 for tensor in call.tensors().values()]
    args, kwargs = call.with_tensors(other)
    again = call_of(Any(), args, kwargs)
    assert [torch.equal(a, b) for a, b in zip(again.tensors().values(), other, strict=True)]
    assert (again.names, len(args)) == (call.names, len(arguments))


def test_random_inputs_follow_the_description():
    outputs = random_inputs("tokens:int64[16]<7; mask:bool[16];x:bfloat16[1,2]", 5, classes=3)
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in outputs.items()}
    assert shapes == {
        "tokens": ([5, 16], torch.int64), "mask": ([5, 16], torch.bool),
        "x": ([5, 1, 2], torch.bfloat16),
    }  # fmt: skip
    assert 0 <= outputs["tokens"].min() <= outputs["tokens"].max() == 6
    for text in ("x", "x:float32", "x:float32[3", "x:int64[3]<a", "x:object[3]", ""):
        with pytest.raises(ConfigError, match="is not an input description"):
            random_inputs(text, 1, classes=3)
