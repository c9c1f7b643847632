"""The documents' commands run, in their order, where what they speak of is there.

Of `console` blocks, all that can be typed as it stands: what has an ellipsis is no command, and
what begins with srun or torchrun, or speaks of s3://, is run by the tests of SLURM, of the example
and of S3. Capital words stand for places. Trainings take two steps.
"""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from commands import ROOT, in_folder
from PIL import Image

DOCUMENTS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
RUN, EXPORT, OTHER = "runs/digits-cnn", "a.torchscript.pt", "b.pt2"
PLACES = {
    "RUN": RUN, "A": RUN, "B": "runs/other", "C": RUN, "PATH": f"{RUN}/exports/w.safetensors",
    "FOLDER": "brought", "EXPORT": EXPORT, "OTHER": OTHER, "PLACE": f"{RUN}/exports/w.safetensors",
    "RUNS": "runs",
}  # fmt: skip
FAILS = {"checkpoints verify runs/broken": 1, "checkpoints diff": 1}
"""Commands that show what is wrong, or another."""


def typed(document):
    """Return the commands of a document, as words."""
    text = (ROOT / "docs" / document).read_text()
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ")
            is_ours = command.startswith("python -m trainer")
            if is_ours and "…" not in command and "s3://" not in command:
                found.append(shlex.split(command, comments=True))
    return found


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
    )
    (folder / "pictures").mkdir()
    Image.new("L", (8, 8)).save(folder / "pictures/0.png")
    (folder / "books").mkdir()
    for number in range(400):
        (folder / f"books/{number}.txt").write_text(f"book {number} " * 80)
    return command


def run(command, words):
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    return subprocess.run(
        words, cwd=command.folder, env=command.env, capture_output=True, text=True, timeout=300
    )


def as_typed(words):
    """Return a command with its places, and of a training the two steps that it gets."""
    words = [PLACES.get(word, word) for word in words]
    words = [re.sub(r"(?<==)[A-Z]+$", lambda m: PLACES[m[0]], word) for word in words]
    if "trainer.run" in words and not {"--help", "--check", "--cfg", "-m"} & set(words[3:]):
        words += ["trainer.max_steps=2"]
        words += [] if any(w.startswith("name=") for w in words) else ["name=of-a-document"]
    return words


def test_the_documents_have_commands():
    assert sum(len(typed(document)) for document in DOCUMENTS) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if typed(d)])
def test_its_commands_run(prepared, document):
    weights_of_others(prepared.folder)
    for words in typed(document):
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
