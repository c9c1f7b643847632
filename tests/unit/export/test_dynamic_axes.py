"""The option dynamic=: axes of all inputs or of single ones, in exports and their records."""

import re
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.trained_runs import a_trained_run

from trainer.errors import ConfigError
from trainer.export.contract import ExportError
from trainer.export.dynamic_axes import DynamicAxes, halved, lengths
from trainer.export.exported_model import Choices
from trainer.export.exporting import export
from trainer.export.formats import open_export

INPUTS = {"a": torch.zeros(3, 6, 4), "b": torch.zeros(3, 5, 4), "bias": torch.zeros(4)}


@pytest.mark.parametrize(("text", "expected"), [
    ("none", {"a": {}, "b": {}, "bias": {}}),
    ("batch", {"a": {0: "batch"}, "b": {0: "batch"}, "bias": {}}),
    ("0", {"a": {0: "batch"}, "b": {0: "batch"}, "bias": {}}),
    ("batch,2", {"a": {0: "batch", 2: "axis2"}, "b": {0: "batch", 2: "axis2"}, "bias": {}}),
    ("2=width", {"a": {2: "width"}, "b": {2: "width"}, "bias": {}}),
    ("a:batch,1", {"a": {0: "batch", 1: "axis1"}, "b": {}, "bias": {}}),
    ("batch; a:1=s ;b:1=t", {"a": {0: "batch", 1: "s"}, "b": {0: "batch", 1: "t"}, "bias": {}}),
    ("batch;bias:0=k", {"a": {0: "batch"}, "b": {0: "batch"}, "bias": {0: "k"}}),
])  # fmt: skip
def test_axes_of_inputs(text, expected):
    assert DynamicAxes.parse(text).of(INPUTS, 3) == expected


@pytest.mark.parametrize(("text", "message"), [
    ("all", "write batch, none"), ("", "write batch, none"), ("batch,-1", "write batch, none"),
    ("batch;", "write batch, none"), ("a:", "write batch, none"), (":1", "write batch, none"),
    ("a:1=2", "write batch, none"), ("none;a:1", "write batch, none"), ("a b:1", "write batch"),
    ("c:1", "the model has no input 'c' (valid: a, b, bias)"),
    ("bias_:0=k", "did you mean 'bias'"),
    ("bias:1", r"the shape of bias is [4], so it has no axis 1"),
    ("batch,1", "'axis1' of b has the size 5, that of a has 6. Give them different names, such as "
                "'batch;a:1=one;b:1=two'"),
])  # fmt: skip
def test_dynamic_that_is_malformed_or_does_not_fit_is_rejected(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        DynamicAxes.parse(text).of(INPUTS, 3)


def test_batch_axis_of_flattened_samples_is_the_largest():
    flattened = {"a": torch.zeros(12, 4), "b": torch.zeros(12), "bias": torch.zeros(4)}
    axes = DynamicAxes.parse("batch").of(flattened, 3)
    assert axes == {"a": {0: "batch"}, "b": {0: "batch"}, "bias": {}}


@given(st.text(alphabet="ab:;,=01 batchnone", max_size=12))
def test_any_text_is_parsed_or_rejected(text):
    with suppress(ConfigError):
        axes = DynamicAxes.parse(text)
        assert axes.has_batch == ("batch" in str((axes.every, axes.single)))


def test_halved_shortens_the_named_axes_in_all_inputs():
    axes = DynamicAxes.parse("batch;a:1=s;b:1=t;bias:0=s0").of(INPUTS, 3)
    assert lengths(axes) == ["s", "t", "s0"]
    shapes = {name: list(tensor.shape) for name, tensor in halved(INPUTS, axes, ["s", "t"]).items()}
    assert shapes == {"a": [3, 3, 4], "b": [3, 2, 4], "bias": [4]}


# --- exports ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """A function that saves a run with a model of export_models."""

    def make(name):
        return a_trained_run(
            tmp_path_factory.mktemp(name), "data=digits", "~model.input_shape", "~model.classes",
            f"model._target_=support.export_models.{name}", steps=0,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def two_lengths(run_of):
    return run_of("TwoLengths")


def choices(inputs):
    return Choices(allowed=["support.export_models"], inputs=inputs)


TWO = choices("a:float32[6,4];b:float32[5,4]")
MASKED = choices("a:float32[6,4];b:float32[5,4];mask:float32[6]")


def shapes(record, key):
    return {item["name"]: item["shape"] for item in record[key]}


@pytest.mark.parametrize(("dynamic", "inputs", "outputs"), [
    ("batch;a:1=source;b:1=target",
     {"a": ["batch", "source", 4], "b": ["batch", "target", 4]},
     {"scores": ["batch", "source", "target"], "mean": ["batch", 4],
      "all": ["batch", "source,target", 4]}),
    ("batch;b:1", {"a": ["batch", 6, 4], "b": ["batch", "axis1", 4]},
     {"scores": ["batch", 6, "axis1"], "mean": ["batch", 4], "all": ["batch", "axis1", 4]}),
    ("b:1=target", {"a": [1, 6, 4], "b": [1, "target", 4]},
     {"scores": [1, 6, "target"], "mean": [1, 4], "all": [1, "target", 4]}),
    ("none", {"a": [1, 6, 4], "b": [1, 5, 4]},
     {"scores": [1, 6, 5], "mean": [1, 4], "all": [1, 11, 4]}),
])  # fmt: skip
def test_record_has_the_names_of_dynamic_axes_and_fixed_sizes(
    two_lengths, tmp_path, dynamic, inputs, outputs
):
    options = {"dynamic": dynamic}
    done = export(two_lengths, "torch_export", out=f"{tmp_path}/a", choices=TWO, options=options)
    assert shapes(done.record, "inputs") == inputs
    assert shapes(done.record, "outputs") == outputs
    assert done.record["parity"]["batch_sizes"] == ([1, 2, 5] if "batch" in dynamic else [1])
    runner = open_export(done.path)
    example = [{1: 1, "batch": 4, "source": 9, "target": 3, "axis1": 8}.get(n, n) for n in (
        size for shape in inputs.values() for size in shape)]  # fmt: skip
    a, b = torch.randn(example[:3]), torch.randn(example[3:])
    actual = runner.run({"a": a.numpy(), "b": b.numpy()})
    assert actual["scores"].shape == (*a.shape[:2], b.shape[1])


@pytest.mark.parametrize(("dynamic", "message"), [
    ("batch;a:1=s;b:1=t;mask:1=m", "'m' and 's' are always equal in this model; give both one"),
    ("batch;a:1=s;b:1=t", "the size of axis 's' is fixed to 6"),
])  # fmt: skip
def test_axes_that_are_equal_in_the_model_need_one_name(two_lengths, tmp_path, dynamic, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        export(
            two_lengths, "torch_export", out=f"{tmp_path}/a", choices=MASKED,
            options={"dynamic": dynamic},
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["torch_export", pytest.param("onnx", marks=pytest.mark.slow)])
def test_t5_export_runs_with_other_encoder_and_decoder_lengths(run_of, tmp_path, form):
    pytest.importorskip("transformers")
    if form == "onnx":
        pytest.importorskip("onnxscript")
    from support.export_models import tiny_t5

    run = run_of("tiny_t5")
    description = "input_ids:int64[12]<50;attention_mask:int64[12]<2;decoder_input_ids:int64[7]<50"
    axes = "batch;input_ids:1=source;attention_mask:1=source;decoder_input_ids:1=target"
    done = export(
        run, form, out=f"{tmp_path}/a", choices=choices(description), options={"dynamic": axes}
    )
    assert shapes(done.record, "inputs") == {
        "input_ids": ["batch", "source"], "attention_mask": ["batch", "source"],
        "decoder_input_ids": ["batch", "target"],
    }  # fmt: skip
    assert shapes(done.record, "outputs")["logits"] == ["batch", "target", 50]
    if form == "onnx":
        import onnx

        names = {
            tensor.name: [dim.dim_param for dim in tensor.type.tensor_type.shape.dim]
            for tensor in onnx.load(done.path).graph.input
        }
        assert names == shapes(done.record, "inputs")
    model = tiny_t5().eval()
    weights = export(run, "state_dict", out=f"{tmp_path}/w.pt").path
    model.load_state_dict(torch.load(weights, weights_only=True))
    runner = open_export(done.path)
    for count, source, target in ((2, 5, 9), (4, 20, 3), (1, 8, 8)):
        inputs = {
            "input_ids": torch.randint(50, (count, source)),
            "attention_mask": (torch.arange(source) < source - 1).long().expand(count, source),
            "decoder_input_ids": torch.randint(50, (count, target)),
        }
        with torch.no_grad():
            expected = model(**inputs).logits
        actual = runner.run({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-3, atol=1e-4)
