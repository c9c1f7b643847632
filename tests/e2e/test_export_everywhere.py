"""Exports of several models in every runnable format, from every training mode."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.trained_runs import a_trained_run

from trainer.data.digits import Digits
from trainer.export.__main__ import main
from trainer.export.exported_model import Choices
from trainer.export.exporting import export
from trainer.export.formats import FORMATS, open_export

pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow
RUNNABLE = [name for name, format in FORMATS.items() if format.open_runner]

GPT2 = (
    "{_target_: transformers.GPT2Config, vocab_size: 257, n_positions: 16, n_embd: 16, n_layer: 1, "
    "n_head: 2, bos_token_id: 1, eos_token_id: 1}"
)
TEXT = ["data=text", "task=language_model", "sample.shape=[16]", "+data.files={corpus}/*.txt",
        "+data.eval_share=0.3"]  # fmt: skip
MODELS = {
    "mlp": ["data=digits", "model=mlp"],
    "resnet": ["data=digits", "model=resnet18",
               "model._target_=support.export_models.small_resnet"],
    "gpt": [*TEXT, "model=gpt", "model.layers=2", "model.heads=2", "model.width=16"],
    "dcgan": ["data=digits", "model=dcgan", "task=adversarial", "+model.width=4"],
    "gpt2": [*TEXT, "model=mlp", "~model.input_shape", "~model.classes", f"+model.config={GPT2}",
             "model._target_=transformers.AutoModelForCausalLM.from_config"],
}  # fmt: skip
CHOICES = {
    "resnet": Choices(allowed=["support.export_models"]),
    "dcgan": Choices(part="generator"),  # with the inputs from the task
    "gpt2": Choices(allowed=["transformers"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_export_of_every_model_in_every_format(tmp_path, name):
    if name == "gpt2":
        pytest.importorskip("transformers")
    for index in range(12):
        (tmp_path / f"{index}.txt").write_text("The quick brown fox. " * 20 * (index + 1))
    overrides = [spec.replace("{corpus}", str(tmp_path)) for spec in MODELS[name]]
    run = a_trained_run(tmp_path / "run", *overrides)
    answers = {}
    for form in RUNNABLE:
        done = export(run, form, choices=CHOICES.get(name, Choices()))
        record = done.record
        assert record["parity"]["samples"] == "evaluation data"
        shapes = {spec["name"]: spec["shape"] for spec in record["inputs"]}
        generator = np.random.default_rng(0)
        inputs = {}
        for spec in record["inputs"]:
            assert spec["shape"][0] == "batch"
            size = (4, *shapes[spec["name"]][1:])
            is_float = spec["dtype"] == "float32"
            values = generator.normal(size=size) if is_float else generator.integers(257, size=size)
            inputs[spec["name"]] = values.astype(spec["dtype"])
        answers[form] = open_export(done.path, trusted=True).run(inputs)
    expected = answers.pop("full_model")
    for actual in answers.values():
        assert list(actual) == list(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(actual[key], value, rtol=1e-3, atol=1e-5)


DTYPES = [("fp16", RUNNABLE), ("bf16", ["torchscript", "torch_export", "full_model"])]


def test_export_with_other_dtypes_and_options(tmp_path):
    run = a_trained_run(
        tmp_path / "run", "data=digits", "model=cnn", "+model.batch_norm=true",
        "trainer.ema_decay=0.9",
    )  # fmt: skip
    for dtype, forms in DTYPES:
        for form in forms:
            done = export(run, form, choices=Choices(dtype=dtype))
            assert done.record["dtype"] == dtype
            assert f"-{dtype}." in done.path.name
            actual = open_export(done.path, trusted=True).run(
                {"x": Digits().eval.tensors[0][:3].numpy()}
            )["output"]
            assert actual.dtype == (np.float16 if dtype == "fp16" else np.float32)
    import onnx

    done = export(run, "onnx", options={"opset": "17", "simplify": "true"})
    proto = onnx.load(done.path)
    assert proto.opset_import[0].version == 17
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 1, 8, 8]
    assert str(tmp_path).encode() not in proto.SerializeToString()
    plain = open_export(done.path).run({"x": Digits().eval.tensors[0].numpy()})["output"]
    split = export(run, "onnx", options={"external_bytes": "1000"}, out=f"{tmp_path}/split.onnx")
    assert sorted(path.name for path in split.path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (split.path / "model.onnx.data").stat().st_size > 100_000
    moved = split.path.rename(tmp_path / "elsewhere.onnx")
    actual = open_export(moved).run({"x": Digits().eval.tensors[0].numpy()})["output"]
    np.testing.assert_allclose(actual, plain, rtol=1e-4, atol=1e-5)
    alone = export(run, "torch_export", options={"dynamic": "none"})
    assert alone.record["parity"]["batch_sizes"] == [1]


ALONE = """
import json, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
folder, = sys.argv[1:]
x = np.load(f"{folder}/x.npy")
import torch, onnxruntime
with torch.no_grad():
    jit = torch.jit.load(f"{folder}/a.ts")(torch.from_numpy(x))
    program = torch.export.load(f"{folder}/a.pt2").module()(torch.from_numpy(x))
session = onnxruntime.InferenceSession(f"{folder}/a.onnx", providers=["CPUExecutionProvider"])
(answer,) = session.run(["output"], {"x": x})
actual = {"jit": jit.numpy(), "program": program.numpy(), "onnx": answer}
np.savez(f"{folder}/actual.npz", **actual)
try:
    torch.load(f"{folder}/a.full.pt", weights_only=False)
except ModuleNotFoundError as error:
    print(error.name)
print([name for name in sys.modules if name.split(".")[0] in ("trainer", "models")])
"""


def test_process_without_this_code_gets_the_same_outputs(tmp_path):
    run = a_trained_run(tmp_path / "run", "data=digits", "model=cnn")
    for form in ("torchscript", "torch_export", "onnx", "full_model"):
        export(run, form, out=f"{tmp_path}/a{FORMATS[form].suffix}")
    x = Digits().eval.tensors[0][:6].numpy()
    np.save(tmp_path / "x.npy", x)
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(  # an editable install has an import hook
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(hidden)}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "models\n[]\n"
    expected = open_export(tmp_path / "a.full.pt", trusted=True).run({"x": x})["output"]
    with np.load(tmp_path / "actual.npz") as actual:
        for name in ("jit", "program", "onnx"):
            np.testing.assert_allclose(actual[name], expected, rtol=1e-4, atol=1e-5)


RUN = ["data=digits", "model=cnn", "+model.batch_norm=true", "optimizer=adam", "launch.threads=1",
       "trainer.max_steps=6", "trainer.ema_decay=0.5"]  # fmt: skip


@pytest.mark.parametrize("way", [
    ["launch.nproc=2"],
    ["launch.nproc=2", "parallel=fsdp", "parallel.min_parameters=50"],
    ["parallel.compile=model", "parallel.compile_backend=eager"],
], ids=["ddp", "fsdp", "compiled"])  # fmt: skip
def test_export_is_the_same_from_every_training_mode(command, way, capsys):
    assert (done := command(*RUN, *way, "name=a")).returncode == 0, done.stderr
    run = str(command.folder / "runs/a")
    answers = {}
    for form in FORMATS:
        assert main([run, f"format={form}", "weights=model"]) == 0, capsys.readouterr().err
        if FORMATS[form].open_runner:
            (path,) = (command.folder / "runs/a/exports").glob(f"*6{FORMATS[form].suffix}")
            x = {"x": Digits().eval.tensors[0][:5].numpy()}
            answers[form] = open_export(path, trusted=True).run(x)["output"]
    weights = torch.load(command.folder / "runs/a/exports/step-00000006.pt", weights_only=True)
    from models.cnn import CNN

    model = CNN((1, 8, 8), batch_norm=True).eval()
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        expected = model(Digits().eval.tensors[0][:5]).numpy()
    for actual in answers.values():
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)
    record = json.loads((command.folder / "runs/a/exports/step-00000006.onnx.json").read_text())
    assert record["metrics"]["figures"].keys() >= {"loss", "accuracy"}
