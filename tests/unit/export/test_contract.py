"""The contract of every format: same outputs as the model, complete or not written."""

import hashlib
import importlib.util
import json
import os
import stat
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
    """A CNN with batch norm, dropout and averages, trained a few steps on digits."""
    folder = tmp_path_factory.mktemp("cnn") / "run"
    return a_trained_run(
        folder, "data=digits", "model=cnn", "+model.batch_norm=true", "+model.channels=[4,8]",
        "+model.hidden=16", "trainer.ema_decay=0.5",
    )  # fmt: skip


def reference_model(run, folder, *, averaged=False):
    """Build the run's model directly and load weights read by the safetensors package."""
    out = str(folder / f"weights-{averaged}.safetensors")
    export(run, "safetensors", out=out, choices=Choices(averaged=averaged))
    model = CNN((1, 8, 8), channels=(4, 8), hidden=16, batch_norm=True)
    model.load_state_dict(load_file(out), strict=True)
    return model.eval()


SLOW = [pytest.param("openvino", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=[*(form for form in RUNNABLE if form != "openvino"), *SLOW])
def exported(run, request, tmp_path_factory):
    """The name of each runnable format, and an export of the averaged weights."""
    skip_without(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    choices = Choices(averaged=True)
    return request.param, export(run, request.param, out=f"{folder}/any name", choices=choices)


def test_export_returns_the_outputs_of_the_model(run, tmp_path, exported):
    form, done = exported
    names = sorted(path.name for path in done.path.parent.iterdir())
    assert names == ["any name", "any name.json"]
    assert format_of(done.path) == form
    model = reference_model(run, tmp_path, averaged=True)
    runner = open_export(done.path, trusted=True)
    assert (list(runner.inputs), list(runner.outputs)) == (["x"], ["output"])
    images = Digits().eval.tensors[0]
    for count in (1, 3, 7):
        with torch.no_grad():
            expected = model(images[100 : 100 + count])  # not the samples of the parity check
        outputs = runner.run({"x": images[100 : 100 + count].numpy()})["output"]
        np.testing.assert_allclose(outputs, expected.numpy(), rtol=1e-4, atol=1e-5)
    double = runner.run({"x": images[:1].double().numpy()})["output"]
    assert double.dtype == np.float32


def test_record_describes_the_export(exported):
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
    assert FORMATS[form].last_file in ("", *record["files"])
    for name, file in record["files"].items():
        data = (out if name == "." else out / name).read_bytes()
        assert file == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_help_lists_every_option_of_every_format():
    help_text = usage()
    for name, format in FORMATS.items():
        assert name in help_text
        for key, option in format.options.items():
            assert f"  {key}" in help_text
            assert option.help in help_text
    suffixes = [format.suffix for format in FORMATS.values()]
    assert len(set(suffixes)) == len(suffixes)


# --- rejected exports ---------------------------------------------------------------------------


def write_other_weights(model, path, options):
    """Write TorchScript with one weight changed."""
    with torch.no_grad():
        model.module.fc2.bias[3] += 1e-2
    torchscript.write(model, path, options)
    with torch.no_grad():
        model.module.fc2.bias[3] -= 1e-2


WRONG = replace(FORMATS["torchscript"], write=write_other_weights)


def test_export_with_wrong_outputs_is_not_written(run, tmp_path, monkeypatch):
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
def test_configuration_with_disallowed_target_is_not_called(tmp_path, capsys, group):
    hostile = {"_target_": "os.system", "command": f"touch {tmp_path}/called"}
    run = a_trained_run(tmp_path / "run", "data=digits", "model=mlp", changes={group: hostile})
    for form in RUNNABLE:
        assert main([run, f"format={form}"]) == 2
        assert "allow=os.system" in capsys.readouterr().err
    assert not (tmp_path / "run/exports").exists()
    assert main([run, "format=safetensors"]) == 0  # weights need no configuration
    assert not (tmp_path / "called").exists()


def test_pickle_is_opened_only_if_trusted(run, tmp_path):
    path = export(run, "full_model", out=str(tmp_path / "a.full.pt")).path
    with pytest.raises(ConfigError, match="trusted=true"):
        open_export(path)
    model = torch.load(path, weights_only=False)
    assert isinstance(model, CNN)
    assert not model.training


def test_pickle_without_its_code_names_the_missing_module(tmp_path, monkeypatch):
    package = tmp_path / "code"
    package.mkdir()
    (package / "lost.py").write_text("from models.cnn import CNN\nclass Net(CNN):\n    pass\n")
    monkeypatch.syspath_prepend(str(package))
    run = a_trained_run(tmp_path / "run", "data=digits", "model=cnn", "model._target_=lost.Net")
    path = export(run, "full_model", choices=Choices(allowed=["lost"])).path
    monkeypatch.delitem(sys.modules, "lost")
    (package / "lost.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"needs the code .* No module named 'lost'"):
        open_export(path, trusted=True)


@pytest.mark.parametrize("form", ["torchscript", "torch_export", "full_model"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"x" * 5000])
def test_open_export_with_other_content_raises_export_error(tmp_path, form, content):
    path = tmp_path / f"a{FORMATS[form].suffix}"
    path.write_bytes(content)
    with pytest.raises(ExportError):
        open_export(path, trusted=True)


@pytest.mark.parametrize(("arguments", "text"), [
    (["format=onnx", "method=script"], "it is an option of format=torchscript"),
    (["format=onnx", "dynamc=none"], "did you mean 'dynamic'"),
    (["format=onnx", "dynamic=all"], "write batch, none, axes such as batch,1"),
    (["format=onnx", "opset=new"], "opset=new is not an integer"),
    (["format=torchscript", "method=scripts"], "did you mean 'script'"),
    (["format=torchscript", "freeze=yes"], "freeze=yes is neither true nor false"),
    (["format=torchscript", "traced=convv1"], "did you mean 'conv1'"),
    (["format=torchscript", "part=convv1"], "did you mean 'conv1'"),
    (["format=torchscript", "inputs=x:float99[3]"], "'x:float99[3]' is not an input description"),
    (["format=torchscript", "inputs=y:float32[1,8,8]"], "does not accept these arguments"),
    (["format=torchscript", "inputs=x:float32[3]"], "cannot be called with x [2, 3]"),
    (["format=torchscript", "atol=small"], "atol  'small' does not fit"),
    (["format=torchscript", "atol=-1"], "atol  -1.0 is too small (nearest: 0)"),
    (["format=torchscript", "rtol=nan"], "rtol  nan is not a number"),
    (["format=torchscript", "device=gpu"], "device=gpu"),
    (["format=torchscript", "data=mnist"], "no option 'data'"),
    (["format=torchscript", "model.hiden=3"], "hiden"),
    (["dtype=fp8"], "dtype=fp8"),
    (["dtype=bf16", "part=convv1"], "did you mean 'conv1'"),
])  # fmt: skip
def test_command_with_wrong_argument_prints_one_message(run, capsys, arguments, text):
    assert main([run, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_device_is_reported(run, capsys):
    assert main([run, "format=torchscript", "device=cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize(("form", "options"), [
    ("safetensors", {}), ("safetensors", {"max_shard_bytes": "5KB"}), ("state_dict", {}),
    ("checkpoint", {}), ("full_model", {}), ("oneflow", {}),
])  # fmt: skip
def test_export_files_have_the_permissions_of_the_umask(run, tmp_path, form, options, umask):
    assert permissions_after(umask, run, form, tmp_path / "a", options) == {0o666 & ~umask}


@pytest.mark.parametrize("form", [
    "torchscript", "torch_export", pytest.param("onnx", marks=pytest.mark.slow), *SLOW,
])  # fmt: skip
def test_captured_graph_files_have_the_permissions_of_the_umask(run, tmp_path, form):
    skip_without(form)
    assert permissions_after(0o027, run, form, tmp_path / "a", {}) == {0o640}


def permissions_after(umask, run, form, out, options):
    """The permissions of all files of an export and of its record."""
    before = os.umask(umask)
    try:
        export(run, form, out=str(out), options=options)
    finally:
        os.umask(before)
    return {stat.S_IMODE(path.stat().st_mode) for path in out.parent.rglob("*") if path.is_file()}


# --- destination -------------------------------------------------------------------------------


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


def test_folder_export_replaces_only_an_older_export(run, tmp_path, monkeypatch):
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


def test_folder_export_to_object_store_uploads_last_file_last(run, monkeypatch):
    monkeypatch.setitem(FORMATS, "folder", FOLDER)
    url = "memory://exports/of"
    done = export(run, "folder", out=f"{url}/a.folder")
    assert done.url == f"{url}/a.folder"
    store = open_store(url)
    names = ["a.folder/a", "a.folder/deep/z", "a.folder/done"]
    assert store.list("") == sorted([*names, "a.folder.json"])
    order = sorted([*names, "a.folder.json"], key=store.modified_s)
    assert order == [*names, "a.folder.json"]
    export(run, "safetensors", out=f"{url}/a.folder")
    assert store.list("") == ["a.folder", "a.folder.json"]


def test_export_without_data_is_compared_on_random_values(tmp_path, capsys):
    run = a_trained_run(tmp_path / "run", "data=digits", "model=mlp")
    missing_data = ["data._target_=trainer.data.mnist.Mnist", f"data.dir={tmp_path}/none"]
    assert main([run, "format=torchscript", *missing_data]) == 0
    assert "random values (data.dir=" in capsys.readouterr().out
