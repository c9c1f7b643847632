"""Sample outputs of a finished run."""

import io
import json

import pytest
import torch
from support.gan_jobs import gan_job
from support.loop_jobs import DATA, a_job, everything, go_on
from torch import nn
from torch.utils.data import TensorDataset

from models.gpt import GPT
from trainer.errors import DataError
from trainer.storage import open_store
from trainer.task import Adversarial, Classification, LanguageModel
from trainer.training import sample_outputs
from trainer.training.ema import Ema

pytestmark = pytest.mark.usefixtures("one_thread")


def read(store, name):
    return json.loads(store.read(f"samples/{name}"))


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 7), (3, 64, 2), (1, 1, 1)])
def test_png_is_decoded_identically_by_pillow(shape):
    image = pytest.importorskip("PIL.Image")
    expected = torch.randint(0, 256, shape, dtype=torch.uint8)
    opened = image.open(io.BytesIO(sample_outputs.png(expected)))
    assert opened.mode == {1: "L", 3: "RGB"}[shape[0]]
    pixels = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(shape[1], shape[2], shape[0]).permute(2, 0, 1), expected)


@pytest.mark.parametrize("image", [
    torch.zeros(1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(4, 4).byte(),
])  # fmt: skip
def test_png_of_another_shape_or_dtype_raises(image):
    with pytest.raises(TypeError, match="use uint8 with 1 or 3 channels"):
        sample_outputs.png(image)


def test_grid_arranges_images_in_rows_and_enlarges_small_ones():
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 30, 60)
    tiles = sample_outputs.grid(images)
    assert tiles.shape == (1, 2 * 32 - 2, 3 * 62 - 2)
    assert [tiles[0, 0, 62 * i].item() for i in range(3)] == [1, 2, 3]
    assert [tiles[0, 32, 62 * i].item() for i in range(3)] == [4, 5, 0]
    assert tiles[0, 30].max() == 0
    assert sample_outputs.grid(images[:1, :, :8, :8]).shape == (1, 48, 48)


class Shows(Classification):
    """Returns given samples and records the state of the model."""

    def __init__(self, output):
        super().__init__()
        self.output, self.calls = output, []

    def samples(self, model, dataset):
        self.calls.append((model.training, torch.is_grad_enabled(), dataset))
        torch.rand(3)
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


def test_show_writes_one_file_per_sample_once_per_step(tmp_path):
    store = open_store(str(tmp_path))
    samples = {
        "words": "one\ntwo\x1b[31m\n",
        "grid": torch.zeros(2, 1, 8, 8).byte(),
        "n": {"a": [1]},
    }
    task = Shows(samples)
    job = a_job(task=task)
    lines = sample_outputs.show(job, 7, store)
    assert store.read("samples/words.txt") == samples["words"].encode()
    assert read(store, "n.json") == {"a": [1]}
    assert store.read("samples/grid.png").startswith(b"\x89PNG")
    assert read(store, "index.json") == {"step": 7, "files": ["grid.png", "n.json", "words.txt"]}
    assert lines[1:] == ["  words:", "    | one", "    | two·[31m"]
    assert task.calls == [(False, False, DATA.eval)]
    assert sample_outputs.show(job, 7, store) == []
    assert len(task.calls) == 1
    task.output = {"words": "\n".join(["a" * 101, *"bcdefghijklm"])}
    lines = sample_outputs.show(job, 9, store)
    assert (lines[2], lines[3]) == (f"    | {'a' * 99}…", "    | b")
    assert (lines[-1], len(lines)) == ("    | …", 13)
    assert store.entries("samples") == ["index.json", "words.txt"]
    assert job.model.training


def test_show_leaves_training_state_unchanged(tmp_path):
    job = a_job(task=Shows({}))
    state, _ = go_on(tmp_path, job)
    before = everything(job, state)
    assert sample_outputs.show(job, state.step, open_store(str(tmp_path))) == []
    assert everything(job, state) == before


@pytest.mark.parametrize(("output", "text"), [
    (DataError("no such file"), "warning: no samples: no such file. The run itself is finished"),
    (KeyError("a bug"), "Traceback"),
    ({"a": object()}, "TypeError"),
    ({"../a": "text"}, "use letters"),
])  # fmt: skip
def test_show_reports_errors_instead_of_raising(tmp_path, output, text):
    job = a_job(task=Shows(output))
    lines = "\n".join(sample_outputs.show(job, 1, open_store(str(tmp_path))))
    assert text in lines
    assert "the run itself is finished" in lines.lower()
    assert job.model.training


# --- the shipped tasks -------------------------------------------------------------------------


def test_classification_samples_use_averaged_weights(tmp_path):
    store = open_store(str(tmp_path))
    job = a_job(max_steps=3)
    job.ema = Ema(job.model, 0.5)
    go_on(tmp_path, job)
    sample_outputs.show(job, 3, store)
    output = read(store, "predictions.json")
    inputs, labels = DATA.eval.tensors
    job.model.eval()
    with job.ema.in_place(), torch.no_grad():
        chances, predicted = job.model(inputs).softmax(1).max(1)
    assert [row["index"] for row in output["samples"]] == list(range(23))
    assert [row["label"] for row in output["samples"]] == labels.tolist()
    assert [row["prediction"] for row in output["samples"]] == predicted.tolist()
    assert [row["probability"] for row in output["samples"]] == pytest.approx(chances.tolist())
    confusion = [[0] * 3 for _ in range(3)]
    for label, prediction in zip(labels.tolist(), predicted.tolist(), strict=True):
        confusion[label][prediction] += 1
    assert output["confusion"] == confusion
    assert (output["confusion_samples"], output["classes"]) == (23, [0, 1, 2])
    assert read(store, "index.json")["files"] == ["predictions.json"]  # the inputs are not images


def test_classification_samples_are_at_most_24_with_their_images():
    data = TensorDataset(torch.linspace(-1, 1, 150)[:, None, None, None].expand(150, 3, 4, 4),
                         torch.zeros(150, dtype=torch.int64))  # fmt: skip
    data.classes = ["cat", "dog"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        output = Classification().samples(model, data)
    assert (len(output["predictions"]["samples"]), output["predictions"]["confusion_samples"]) == (
        24, 150,
    )  # fmt: skip
    assert output["predictions"]["classes"] == ["cat", "dog"]
    assert output["images"].shape == (24, 3, 4, 4)
    assert (output["images"].min(), output["images"].max()) == (0, 255)


class Letters(TensorDataset):
    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


def test_language_model_sample_continues_text_from_the_data():
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (4, 40))
    model = GPT(vocabulary=7, context=40, layers=1, heads=1, width=8)
    output = LanguageModel().samples(model, Letters(tokens, tokens))["text"]
    assert output[:32] == Letters(tokens).decode(tokens[0, :32].tolist())
    assert len(output) == 432
    assert LanguageModel().samples(model, TensorDataset(tokens, tokens)) == {}
    assert LanguageModel().samples(nn.Linear(2, 2), Letters(tokens, tokens)) == {}


def test_adversarial_samples_use_the_same_noise_in_every_run():
    model = gan_job().model.eval()
    with torch.no_grad():
        first = Adversarial().samples(model, None)["images"]
        torch.manual_seed(5)
        assert torch.equal(first, Adversarial().samples(model, None)["images"])
    assert (first.shape, first.dtype) == ((64, 1, 8, 8), torch.uint8)


def test_show_without_evaluation_data_uses_training_data(tmp_path):
    task = Shows({})
    job = a_job(task=task, evaluation=None)
    sample_outputs.show(job, 1, open_store(str(tmp_path)))
    assert task.calls[0][2] is job.data.dataset
