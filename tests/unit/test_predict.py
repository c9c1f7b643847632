"""Predictions on images, arrays, IDX files and data groups, and the comparison of exports."""

import json
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.trained_runs import a_trained_run

from trainer import predict
from trainer.data.digits import Digits
from trainer.errors import DataError
from trainer.export.destination import record_path
from trainer.export.exporting import export
from trainer.export.inputs import Batch
from trainer.export.predicting import compare_exports, finite


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, trained a few steps."""
    folder = tmp_path_factory.mktemp("run")
    return a_trained_run(folder, "model=mlp", steps=60)


@pytest.fixture(scope="module")
def exported(run):
    return str(export(run, "torchscript").path)


@pytest.fixture(scope="module")
def module(exported):
    """The reference: the export, loaded with torch.jit.load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated
        return torch.jit.load(exported)


def run_predict(capsys, *arguments, code=0):
    assert predict.main(list(arguments)) == code
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return output.out if code == 0 else output.err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predict_with_a_fixed_batch_size_runs_batches_of_that_size(capsys, run, module, tmp_path):
    fixed = export(run, "torch_export", out=f"{tmp_path}/a.pt2", options={"dynamic": "none"})
    images = Digits().eval.tensors[0][:5].numpy()
    np.save(tmp_path / "images.npy", images)
    out = f"{tmp_path}/a.npz"
    run_predict(capsys, str(fixed.path), f"input={tmp_path}/images.npy", f"out={out}")
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(np.load(out)["output"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flag", [["--config-dir", "{}"], ["--config-dir={}"]])
def test_predict_with_config_dir_uses_the_users_groups(capsys, exported, tmp_path, flag):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text(
        "_target_: trainer.data.synthetic.Synthetic\nshape: [1, 8, 8]\neval_samples: 7\n"
    )
    folder = [part.format(tmp_path) for part in flag]
    run_predict(capsys, exported, "data=mine", *folder, f"out={tmp_path}/a.jsonl")
    assert len(lines(tmp_path / "a.jsonl")) == 7
    err = run_predict(capsys, exported, "data=digits", "--config-dir", "nowhere", code=2)
    assert "--config-dir 'nowhere' is not a directory" in err


def test_predict_on_data_group_reports_class_probability_and_accuracy(
    capsys, exported, module, tmp_path
):
    out = run_predict(capsys, exported, "data=digits", f"out={tmp_path}/a.jsonl")
    images, labels = Digits().eval.tensors
    with torch.no_grad():
        probabilities = module(images).softmax(1)
    results = lines(tmp_path / "a.jsonl")
    assert [line["class"] for line in results] == probabilities.argmax(1).tolist()
    assert [line["label"] for line in results] == labels.tolist()
    np.testing.assert_allclose(
        [line["probability"] for line in results], probabilities.max(1).values, atol=2e-6
    )
    right = (probabilities.argmax(1) == labels).float().mean()
    assert f"accuracy {right:.4f} of 359" in out
    assert right > 0.5  # so the model is trained


def test_predict_on_images_applies_the_evaluation_transform(capsys, exported, module, tmp_path):
    images, _ = Digits().eval.tensors
    pixels = (images[:3] * 255).round().to(torch.uint8)
    (tmp_path / "in").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture[0].numpy()).save(tmp_path / "in" / f"{number}.png")
    run_predict(capsys, exported, f"input={tmp_path}/in", f"out={tmp_path}/a.jsonl", "top=3")
    with torch.no_grad():
        probabilities = module(pixels.float() / 255).softmax(1)
    results = lines(tmp_path / "a.jsonl")
    assert [line["input"] for line in results] == [f"{tmp_path}/in/{n}.png" for n in range(3)]
    assert [line["class"] for line in results] == probabilities.argmax(1).tolist()
    likeliest = [item["class"] for item in results[0]["top"]]
    assert likeliest == probabilities[0].argsort(descending=True)[:3].tolist()
    output = run_predict(capsys, exported, f"input={tmp_path}/in/*.png")
    assert f"{tmp_path}/in/0.png" in output
    large = Image.fromarray(pixels[0, 0].numpy()).resize((80, 80)).convert("RGB")
    large.save(tmp_path / "large.jpg")
    assert str(probabilities[0].argmax().item()) in run_predict(
        capsys, exported, f"input={tmp_path}/large.jpg"
    )


def test_predict_on_image_standardizes_as_in_training(capsys, tmp_path):
    colours = ((255, 0, 0), (0, 0, 255))
    for part in ("train", "eval"):
        for name, colour in zip(("blue", "red"), reversed(colours), strict=True):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (20, 16), colour).save(folder / f"{number}.png")
    folder = a_trained_run(
        tmp_path / "run", "data=image_folder", f"data.dir={tmp_path}/data", "model=mlp",
        "sample.shape=[3,8,8]", "sample.classes=2", "++data.mean=[0.2,0.3,0.4]", "++data.std=0.25",
        steps=30,
    )  # fmt: skip
    exported = str(export(folder, "torchscript").path)
    preprocessing = json.loads(record_path(Path(exported)).read_text())["preprocessing"]
    assert preprocessing["mean"] == [0.2, 0.3, 0.4]
    assert (preprocessing["std"], preprocessing["classes"]) == (0.25, ["blue", "red"])
    Image.new("RGB", (31, 17), colours[0]).save(tmp_path / "red.png")
    run_predict(capsys, exported, f"input={tmp_path}/red.png", f"out={tmp_path}/o.jsonl")
    (line,) = lines(tmp_path / "o.jsonl")
    assert line["class"] == "red"
    pixel = torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(preprocessing["mean"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.load(exported)
    picture = (pixel / 0.25)[:, None, None].expand(3, 8, 8)[None]
    with torch.no_grad():
        probability = model(picture).softmax(1)[0, 1]
    assert line["probability"] == pytest.approx(float(probability), abs=1e-5)


def test_predict_on_arrays_and_idx_files(capsys, exported, module, tmp_path):
    images, _ = Digits().eval.tensors
    np.save(tmp_path / "a.npy", images[:5].numpy())
    run_predict(
        capsys, exported, f"input={tmp_path}/a.npy", f"out={tmp_path}/o.npz", "batch_size=2"
    )
    with torch.no_grad():
        expected = module(images[:5]).numpy()
    (results,) = np.load(tmp_path / "o.npz").values()
    np.testing.assert_allclose(results, expected, atol=1e-5)
    np.savez(tmp_path / "a.npz", images=images[:5].numpy())
    run_predict(capsys, exported, f"input={tmp_path}/a.npz", f"out={tmp_path}/o2.npz")
    (again,) = np.load(tmp_path / "o2.npz").values()
    np.testing.assert_allclose(again, expected, atol=1e-5)
    pixels = (images[:4] * 255).round().to(torch.uint8).numpy()
    data = bytes([0, 0, 8, 3]) + struct.pack(">III", 4, 8, 8) + pixels.tobytes()
    (tmp_path / "t-idx3-ubyte").write_bytes(data)
    run_predict(capsys, exported, f"input={tmp_path}/t-idx3-ubyte", f"out={tmp_path}/o3.npz")
    (idx,) = np.load(tmp_path / "o3.npz").values()
    with torch.no_grad():
        expected = module(torch.from_numpy(pixels).float() / 255).numpy()
    np.testing.assert_allclose(idx, expected, atol=1e-5)


def test_compare_runs_two_exports_on_the_same_inputs(capsys, run, exported, tmp_path):
    other = str(export(run, "torch_export").path)
    output = run_predict(capsys, exported, other, "--compare", "data=digits")
    assert "same class for 359 of 359 inputs (100.00%)" in output
    assert "times as fast as the first" in output
    worse = a_trained_run(tmp_path / "worse", "model=mlp", "seed=5", steps=1)
    output = run_predict(
        capsys, exported, str(export(worse, "torchscript").path), "--compare", "data=digits"
    )
    assert "same class for 359 of 359" not in output


class Constant:
    """An export with constant outputs."""

    def __init__(self, *values):
        self.values = np.array([values])

    def run(self, arrays):
        return {"y": self.values}


def test_compare_reports_nonfinite_values():
    nan = float("nan")

    def output(first, second):
        batches = iter([Batch(["a"], {"x": np.zeros(1)})] * 3)
        return compare_exports(Constant(*first), Constant(*second), batches, ["a", "b"])

    assert "warning" not in output((1.0, nan), (1.0, nan))
    results = output((1.0, 2.0, float("inf")), (1.5, nan, float("inf")))
    assert "largest output difference: 0.5" in results
    assert "warning: 3 values are NaN or infinite in only one export" in results
    with pytest.raises(DataError, match="output shapes differ"):
        output((1.0,), (1.0, 2.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("input=nowhere.png",), "no such file"),
        ((), "give either input=… or data=…"),
        (("input=a.png", "data=digits"), "give either input=… or data=…"),
        (("data=digitz",), "did you mean 'digits'?"),
        (("input={here}/text.txt",), "unknown file type"),
        (("input={here}/broken.png",), "is not a readable image"),
        (("input={here}/broken.npy",), "cannot be read"),
        (("input={here}/broken.npz",), "cannot be read"),
        (
            ("input={here}/wide.npy",),
            "does not accept x float32[2, 77] (it was exported with x float32[batch, 1, 8, 8])",
        ),
        (("data=digits", "device=tpu"), "tpu"),
        (("data=digits", "top=0"), "top  0 is too small (nearest: 1)"),
        (("data=digits", "--compare"), "2 exports needed, 1 given"),
    ],
)
def test_command_with_bad_input_prints_one_message(capsys, exported, tmp_path, arguments, message):
    (tmp_path / "text.txt").write_text("a")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04junk")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY no")
    np.save(tmp_path / "wide.npy", np.zeros((2, 77), np.float32))
    argv = [argument.format(here=tmp_path) for argument in arguments]
    assert predict.main([exported, *argv]) in (1, 2)
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err


def test_finite_maps_nan_and_infinity_to_null():
    line = {"input": "a", "y": [1.0, float("nan"), [float("inf")]], "n": 3}
    assert finite(line) == {"input": "a", "y": [1.0, None, [None]], "n": 3}


def test_pickled_module_is_opened_only_if_trusted(capsys, run, exported, tmp_path):
    pickled = str(export(run, "full_model", out=f"{tmp_path}/pickled.pt").path)
    assert "trusted=true" in run_predict(capsys, pickled, "data=digits", code=2)
    output = run_predict(capsys, exported, pickled, "--compare", "data=digits", "trusted=true")
    assert "same class for 359 of 359 inputs (100.00%)" in output


def test_weights_and_exports_without_a_record_raise_config_error(capsys, run, exported, tmp_path):
    weights = str(export(run, "safetensors").path)
    assert "which cannot be run" in run_predict(capsys, weights, "data=digits", code=2)
    alone = tmp_path / Path(exported).name
    shutil.copy(exported, alone)
    assert "copy both" in run_predict(capsys, str(alone), "data=digits", code=2)
    record_path(alone).write_text("{}")
    assert "does not describe an export" in run_predict(capsys, str(alone), "data=digits", code=2)
