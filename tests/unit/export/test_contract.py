"""Every format under one list of promises: it answers as the model does, whole or not at all."""

import hashlib
import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.trained_runs import a_trained_run

from models.cnn import CNN
from trainer.data.digits import Digits
from trainer.errors import ConfigError
from trainer.export import torchscript
from trainer.export.__main__ import main, usage
from trainer.export.contract import ExportError, Format, Option
from trainer.export.destination import record_path
from trainer.export.exported_model import Choices
from trainer.export.exporting import export
from trainer.export.formats import FORMATS, format_of, open_export
from trainer.storage import open_store

RUNNABLE = [name for name, format in FORMATS.items() if format.open_runner]
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}


def skip_without(form):
    for library in NEEDS.get(form, ()):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"format={form} needs {library}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A CNN with batch norm, dropout and averages, trained some steps on digits."""
    folder = tmp_path_factory.mktemp("cnn") / "run"
    return a_trained_run(
        folder, "data=digits", "model=cnn", "+model.batch_norm=true", "+model.channels=[4,8]",
        "+model.hidden=16", "trainer.ema_decay=0.5",
    )  # fmt: skip


def by_hand(run, folder, *, averaged=False):
    """The run's model, built by hand and loaded with what safetensors' own reader finds."""
    out = str(folder / f"weights-{averaged}.safetensors")
    export(run, "safetensors", out=out, choices=Choices(averaged=averaged))
    model = CNN((1, 8, 8), channels=(4, 8), hidden=16, batch_norm=True)
    model.load_state_dict(load_file(out), strict=True)
    return model.eval()


SLOW = [pytest.param("openvino", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=[*(form for form in RUNNABLE if form != "openvino"), *SLOW])
def exported(run, request, tmp_path_factory):
    """Each format that can be run, and an export in it of the averaged weights."""
    skip_without(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    choices = Choices(averaged=True)
    return request.param, export(run, request.param, out=f"{folder}/any name", choices=choices)


def test_what_was_exported_answers_as_the_model_does(run, tmp_path, exported):
    form, done = exported
    names = sorted(path.name for path in done.path.parent.iterdir())
    assert names == ["any name", "any name.json"]
    assert format_of(done.path) == form
    model = by_hand(run, tmp_path, averaged=True)
    runner = open_export(done.path, trusted=True)
    assert (list(runner.inputs), list(runner.outputs)) == (["x"], ["output"])
    images = Digits().eval.tensors[0]
    for count in (1, 3, 7):
        with torch.no_grad():
            wanted = model(images[100 : 100 + count])  # other samples than were compared
        found = runner.run({"x": images[100 : 100 + count].numpy()})["output"]
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)
    double = runner.run({"x": images[:1].double().numpy()})["output"]
    assert double.dtype == np.float32


def test_the_record_says_what_it_is(exported):
    form, done = exported
    out = done.path
    record = json.loads(record_path(out).read_bytes())
    assert record == done.record
    assert (record["format"], record["step"], record["weights"]) == (form, 3, "ema")
    assert record["metrics"]["figures"] == {"accuracy": 0.5}
    assert record["source"]["checkpoint"] == "checkpoints/step-00000003.0001"
    assert record["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert record["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 10]}]
    (parity,) = record["parity"]["outputs"]
    assert 0 <= parity["max_abs"] <= parity["allowed"] < 1e-3
    assert record["parity"]["samples"] == "evaluation data"
    assert record["preprocessing"]["mean"] == 0.0
    assert record["versions"]["torch"] == torch.__version__
    for name, file in record["files"].items():
        data = (out if name == "." else out / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_help_has_every_option_of_every_format():
    shown = usage()
    for name, format in FORMATS.items():
        assert name in shown
        for key, option in format.options.items():
            assert f"  {key}" in shown
            assert option.help in shown
    suffixes = [format.suffix for format in FORMATS.values()]
    assert len(set(suffixes)) == len(suffixes)


# --- what is refused ---------------------------------------------------------------------------


def write_other_weights(model, path, options):
    """Write TorchScript with one weight changed."""
    with torch.no_grad():
        model.module.fc2.bias[3] += 1e-2
    torchscript.FORMAT.write(model, path, options)
    with torch.no_grad():
        model.module.fc2.bias[3] -= 1e-2


WRONG = replace(torchscript.FORMAT, write=write_other_weights)


def test_an_export_that_answers_otherwise_is_not_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "wrong", WRONG)
    (tmp_path / "model.ts").write_text("an older export")
    with pytest.raises(ExportError, match=r"output differs by up to 0\.01"):
        export(run, "wrong", out=str(tmp_path / "model.ts"))
    assert (tmp_path / "model.ts").read_text() == "an older export"
    with pytest.raises(ExportError, match="differs"):
        export(run, "wrong", out=str(tmp_path / "deep/er/model.ts"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.ts"]
    done = export(run, "wrong", out=str(tmp_path / "model.ts"), atol=0.1)
    assert done.mismatches[0].max_abs == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize("group", ["model", "data", "task"])
def test_a_hostile_configuration_is_not_called(tmp_path, capsys, group):
    hostile = {"_target_": "os.system", "command": f"touch {tmp_path}/called"}
    run = a_trained_run(tmp_path / "run", "data=digits", "model=mlp", changes={group: hostile})
    for form in RUNNABLE:
        assert main([run, f"format={form}"]) == 2
        assert "allow=os.system" in capsys.readouterr().err
    assert not (tmp_path / "run/exports").exists()
    assert main([run, "format=safetensors"]) == 0  # weights need no configuration
    assert not (tmp_path / "called").exists()


def test_a_pickle_is_opened_only_for_who_trusts_it(run, tmp_path):
    path = export(run, "full_model", out=str(tmp_path / "a.full.pt")).path
    with pytest.raises(ConfigError, match="trusted=true"):
        open_export(path)
    model = torch.load(path, weights_only=False)
    assert isinstance(model, CNN)
    assert not model.training


def test_a_pickle_without_its_code_says_what_is_missing(tmp_path, monkeypatch):
    package = tmp_path / "code"
    package.mkdir()
    (package / "gone.py").write_text("from models.cnn import CNN\nclass Net(CNN):\n    pass\n")
    monkeypatch.syspath_prepend(str(package))
    run = a_trained_run(tmp_path / "run", "data=digits", "model=cnn", "model._target_=gone.Net")
    path = export(run, "full_model", choices=Choices(allowed=["gone"])).path
    monkeypatch.delitem(sys.modules, "gone")
    (package / "gone.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"needs the code .* No module named 'gone'"):
        open_export(path, trusted=True)


@pytest.mark.parametrize("form", ["torchscript", "torch_export", "full_model"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"x" * 5000])
def test_a_file_of_something_else_is_no_export(tmp_path, form, content):
    path = tmp_path / f"a{FORMATS[form].suffix}"
    path.write_bytes(content)
    with pytest.raises(ExportError):
        open_export(path, trusted=True)


@pytest.mark.parametrize(("arguments", "text"), [
    (["format=onnx", "method=script"], "it is an option of format=torchscript"),
    (["format=onnx", "dynamc=none"], "did you mean 'dynamic'"),
    (["format=onnx", "dynamic=all"], "write batch, none, or axes such as batch,1"),
    (["format=onnx", "opset=new"], "opset=new is not an integer"),
    (["format=torchscript", "method=scripts"], "did you mean 'script'"),
    (["format=torchscript", "freeze=yes"], "freeze=yes is neither true nor false"),
    (["format=torchscript", "traced=convv1"], "did you mean 'conv1'"),
    (["format=torchscript", "part=convv1"], "did you mean 'conv1'"),
    (["format=torchscript", "inputs=x:float99[3]"], "'x:float99[3]' is not an input description"),
    (["format=torchscript", "inputs=y:float32[1,8,8]"], "does not accept these arguments"),
    (["format=torchscript", "inputs=x:float32[3]"], "cannot be called with x [2, 3]"),
    (["format=torchscript", "atol=small"], "atol=small is not a number"),
    (["format=torchscript", "atol=-1"], "atol=-1 is not a number of 0 or more"),
    (["format=torchscript", "rtol=nan"], "rtol=nan is not a number of 0 or more"),
    (["format=torchscript", "device=gpu"], "device=gpu"),
    (["format=torchscript", "data=mnist"], "no option 'data'"),
    (["format=torchscript", "model.hiden=3"], "hiden"),
    (["dtype=fp8"], "dtype=fp8"),
    (["dtype=bf16", "part=convv1"], "did you mean 'conv1'"),
])  # fmt: skip
def test_a_mistake_is_one_message(run, capsys, arguments, text):
    assert main([run, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_so(run, capsys):
    assert main([run, "format=torchscript", "device=cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


# --- where it goes -----------------------------------------------------------------------------


def write_folder(model, path, options):
    """Write several files, the last of which marks the folder as complete."""
    (path / "deep").mkdir(parents=True)
    for name in ("done", "a", "deep/z"):
        (path / name).write_text(str(len(model.weights())))
    if options["fail"]:
        raise OSError(28, "No space left on device")


FOLDER = Format(
    suffix=".folder", write=write_folder, options={"fail": Option("", "")}, last_file="done"
)


def test_a_folder_replaces_its_older_self_and_nothing_else(run, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "folder", FOLDER)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not an export"):
        export(run, "folder", out=str(out))
    assert (out / "thesis.tex").read_text() == "years of work"
    new = tmp_path / "new"
    export(run, "folder", out=str(new))
    (new / "a").write_text("old")
    with pytest.raises(ConfigError, match="No space left"):
        export(run, "folder", out=str(new), options={"fail": "yes"})
    assert (new / "a").read_text() == "old"
    export(run, "folder", out=str(new))
    assert (new / "a").read_text() == (new / "deep/z").read_text() != "old"
    export(run, "state_dict", out=str(new))
    assert new.is_file()
    export(run, "folder", out=str(new))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.json", "out"]


def test_a_folder_in_an_object_store_gets_its_last_file_last(run, monkeypatch):
    monkeypatch.setitem(FORMATS, "folder", FOLDER)
    place = "memory://exports/of"
    done = export(run, "folder", out=f"{place}/a.folder")
    assert done.url == f"{place}/a.folder"
    store = open_store(place)
    names = ["a.folder/a", "a.folder/deep/z", "a.folder/done"]
    assert store.list("") == sorted([*names, "a.folder.json"])
    order = sorted([*names, "a.folder.json"], key=store.modified_s)
    assert order == [*names, "a.folder.json"]
    export(run, "safetensors", out=f"{place}/a.folder")
    assert store.list("") == ["a.folder", "a.folder.json"]


def test_without_its_data_it_is_compared_on_random_values(tmp_path, capsys):
    run = a_trained_run(tmp_path / "run", "data=digits", "model=mlp")
    gone = ["data._target_=trainer.data.mnist.Mnist", f"data.dir={tmp_path}/none"]
    assert main([run, "format=torchscript", *gone]) == 0
    assert "random values (data.dir=" in capsys.readouterr().out
