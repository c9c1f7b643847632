"""The commands in the documents run, in order, where their requirements are met.

Commands that need SLURM or S3 are run by test_docs_on_slurm.py and test_docs_on_s3.py. Words in
capitals are replaced by paths. Trainings take two steps.
"""

import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from support import documents
from support.run_commands import ROOT, in_folder

RUN, EXPORT, OTHER = "runs/digits-cnn", "a.torchscript.pt", "b.pt2"
PLACES = {
    "RUN": RUN, "A": RUN, "B": "runs/other", "C": RUN, "PATH": f"{RUN}/exports/w.safetensors",
    "FOLDER": "brought", "EXPORT": EXPORT, "OTHER": OTHER, "PLACE": f"{RUN}/exports/w.safetensors",
    "RUNS": "runs",
}  # fmt: skip
FAILS = {"checkpoints verify runs/broken": 1, "checkpoints diff": 1}
"""Commands that show what is wrong, or another."""
SERVERS = {"make s3"}
"""The command that starts the server of test_docs_on_s3.py."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with two runs, exports of one, a damaged one, pictures, texts, others' weights."""
    command = in_folder(tmp_path_factory.mktemp("documents"))
    folder, limits = command.folder, ["trainer.max_epochs=6", "checkpoint.metric=accuracy"]
    averaged = "trainer.ema_decay=0.9"
    assert command(*limits, averaged).returncode == 0
    assert command(*limits, "model=mlp", "name=other", "trainer.max_epochs=1").returncode == 0
    for more in (
        (f"out={RUN}/exports/w.safetensors",),
        ("format=torchscript", f"out={EXPORT}"),
        ("format=torch_export", f"out={OTHER}"),
    ):
        done = run(command, ["python", "-m", "trainer.export", RUN, *more])
        assert done.returncode == 0, done.stderr
    for name in ("broken", "digits_cnn", "digits_high_lr", "digits_mlp"):
        shutil.copytree(folder / RUN, folder / "runs" / name)
    shard = sorted((folder / "runs/broken").rglob("*.safetensors"))[-2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (folder / "mypackage.py").write_text(
        "from trainer.tracking.several import Silent\n"
        "class Tracker(Silent):\n"
        "    def __init__(self, every: int): self.every = every\n"
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self, width: int):\n"
        "        layers = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)\n"
        "        super().__init__(nn.Flatten(), *layers)\n"
    )
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "pictures").mkdir()
    Image.new("L", (8, 8)).save(folder / "pictures/0.png")
    (folder / "books").mkdir()
    for number in range(400):
        (folder / f"books/{number}.txt").write_text(f"book {number} " * 80)
    return command


def run(command, words):
    env, words = documents.to_run(words)
    return subprocess.run(
        words, cwd=command.folder, env={**command.env, **env},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def as_typed(words):
    """Return a command with its places, and of a training the two steps that it gets."""
    words = [PLACES.get(word, word) for word in words]
    words = [re.sub(r"(?<==)[A-Z]+$", lambda m: PLACES[m[0]], word) for word in words]
    if "trainer.run" in words and not {"--help", "--check", "--cfg", "-m"} & set(words[3:]):
        words += [] if any(w.startswith("name=") for w in words) else ["name=of-a-document"]
        return documents.shorter(words)
    return words


def test_documents_have_commands_of_every_kind():
    counts = dict.fromkeys(("", "slurm", "s3"), 0)
    for document in documents.DOCUMENTS:
        for need in counts:
            counts[need] += len(documents.typed(document, need))
        assert {" ".join(words) for words in documents.typed(document, "make")} <= SERVERS
    assert counts[""] >= 20
    assert min(counts.values()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in documents.DOCUMENTS if documents.typed(d, "")])
def test_document_commands_run(prepared, document):
    weights_of_others(prepared.folder)
    for words in documents.typed(document, ""):
        shutil.rmtree(prepared.folder / "runs/of-a-document", ignore_errors=True)
        shutil.rmtree(prepared.folder / "brought", ignore_errors=True)
        done = run(prepared, as_typed(words))
        expected = next((code for text, code in FAILS.items() if text in " ".join(words)), 0)
        assert done.returncode == expected, (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr


def weights_of_others(folder):
    """Write the files of other programs that docs/imports.md speaks of."""
    from models.cnn import CNN
    from models.resnet import resnet18

    torch.manual_seed(0)
    weights = {f"net.{name}": w for name, w in CNN((1, 8, 8)).state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3}, folder / "lightning.ckpt")
    torch.save(resnet18((1, 8, 8), 1000).state_dict(), folder / "resnet18.pth")
