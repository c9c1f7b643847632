"""Weights from other programs pass through a run unchanged, bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from support.state_dicts import save_dcp, save_torch

from models.mlp import MLP

SMALL = [
    "model=mlp", "model.hidden=[6]", "trainer.max_epochs=null", "trainer.max_steps=1",
    "optimizer.lr=0.0", "optimizer.weight_decay=0.0", "launch.threads=1",
]  # fmt: skip


def an_mlp():
    torch.manual_seed(5)
    return MLP(input_shape=[1, 8, 8], hidden=[6]).state_dict()


def make(kind, folder):
    state = an_mlp()
    if kind == "torch.save":
        wrapped = {f"module.{name}": value for name, value in state.items()}
        return save_torch(folder / "a.pt", {"epoch": 3, "model_state_dict": wrapped})
    return save_dcp(folder / "dcp", {"model": state, "step": 7})


@pytest.mark.parametrize("kind", ["torch.save", pytest.param("dcp", marks=pytest.mark.slow)])
def test_imported_weights_are_exported_unchanged(command, kind):
    weights = make(kind, command.folder)
    done = command(*SMALL, "name=first", f"init.weights={weights}")
    assert done.returncode == 0, done.stderr
    again = command(*SMALL, "name=second", "init.weights=runs/first", "seed=3")
    assert again.returncode == 0, again.stderr
    out = command("runs/second", "out=b.safetensors", module="trainer.export")
    assert out.returncode == 0, out.stderr
    weights = load_file(command.folder / "b.safetensors")
    assert weights.keys() == an_mlp().keys()
    assert all(torch.equal(weights[name], value) for name, value in an_mlp().items())


def test_weights_that_do_not_fit_exit_with_2_and_one_message(command):
    weights = make("torch.save", command.folder)
    wrong = command(*SMALL, "model.hidden=[7]", f"init.weights={weights}")
    assert wrong.returncode == 2
    assert f"init.weights={weights} does not fit this model" in wrong.stderr
    assert "layers.1.weight  shape [6, 64] in the file, [7, 64] in the model" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    fits = command(
        *SMALL, "model.hidden=[7]", f"init.weights={weights}", "init.strict=false",
        "init.rename={layers.*.bias:layers.*.bias}", "init.skip=[layers.1.*]",
    )  # fmt: skip
    assert fits.returncode == 0, fits.stderr
    assert "loaded       1 of 4 tensors, 10 elements\n  skipped      2 tensors" in fits.stdout
    absent = command(*SMALL, "init.weights=absent.pt")
    assert absent.returncode == 2
    assert "'absent.pt' is not a file or folder" in absent.stderr
