"""What a finished run shows: the files say what the model does, and nothing of the run changes."""

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
def test_an_image_is_read_back_by_another_library(shape):
    image = pytest.importorskip("PIL.Image")
    made = torch.randint(0, 256, shape, dtype=torch.uint8)
    opened = image.open(io.BytesIO(sample_outputs.png(made)))
    assert opened.mode == {1: "L", 3: "RGB"}[shape[0]]
    pixels = torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(shape[1], shape[2], shape[0]).permute(2, 0, 1), made)


@pytest.mark.parametrize("wrong", [
    torch.zeros(1, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(4, 4).byte(),
])  # fmt: skip
def test_what_is_no_image_is_named(wrong):
    with pytest.raises(TypeError, match="give uint8 with 1 or 3 channels"):
        sample_outputs.png(wrong)


def test_a_grid_has_the_images_in_rows_and_enlarges_small_ones():
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 30, 60)
    laid = sample_outputs.grid(images)
    assert laid.shape == (1, 2 * 32 - 2, 3 * 62 - 2)
    assert [laid[0, 0, 62 * i].item() for i in range(3)] == [1, 2, 3]
    assert [laid[0, 32, 62 * i].item() for i in range(3)] == [4, 5, 0]
    assert laid[0, 30].max() == 0
    assert sample_outputs.grid(images[:1, :, :8, :8]).shape == (1, 48, 48)


class Shows(Classification):
    """Shows what it is given, and where the model was."""

    def __init__(self, given):
        super().__init__()
        self.given, self.calls = given, []

    def samples(self, model, dataset):
        self.calls.append((model.training, torch.is_grad_enabled(), dataset))
        torch.rand(3)
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def test_each_kind_gets_a_file_once_for_each_step(tmp_path):
    store = open_store(str(tmp_path))
    shown = {"words": "one\ntwo\x1b[31m\n", "grid": torch.zeros(2, 1, 8, 8).byte(), "n": {"a": [1]}}
    task = Shows(shown)
    job = a_job(task=task)
    lines = sample_outputs.show(job, 7, store)
    assert store.read("samples/words.txt") == shown["words"].encode()
    assert read(store, "n.json") == {"a": [1]}
    assert store.read("samples/grid.png").startswith(b"\x89PNG")
    assert read(store, "index.json") == {"step": 7, "files": ["grid.png", "n.json", "words.txt"]}
    assert lines[1:] == ["  words:", "    | one", "    | two·[31m"]
    assert task.calls == [(False, False, DATA.eval)]
    assert sample_outputs.show(job, 7, store) == []
    assert len(task.calls) == 1
    task.given = {"words": "\n".join(["a" * 101, *"bcdefghijklm"])}
    lines = sample_outputs.show(job, 9, store)
    assert (lines[2], lines[3]) == (f"    | {'a' * 99}…", "    | b")
    assert (lines[-1], len(lines)) == ("    | …", 13)
    assert store.entries("samples") == ["index.json", "words.txt"]
    assert job.model.training


def test_nothing_that_a_resume_depends_on_changes(tmp_path):
    job = a_job(task=Shows({}))
    state, _ = go_on(tmp_path, job)
    before = everything(job, state)
    assert sample_outputs.show(job, state.step, open_store(str(tmp_path))) == []
    assert everything(job, state) == before


@pytest.mark.parametrize(("wrong", "told"), [
    (DataError("no such file"), "NO SAMPLES: no such file. The run itself is finished"),
    (KeyError("a bug"), "Traceback"),
    ({"a": object()}, "TypeError"),
    ({"../a": "text"}, "use letters"),
])  # fmt: skip
def test_a_failure_is_told_and_not_raised(tmp_path, wrong, told):
    job = a_job(task=Shows(wrong))
    text = "\n".join(sample_outputs.show(job, 1, open_store(str(tmp_path))))
    assert told in text
    assert "the run itself is finished" in text.lower()
    assert job.model.training


# --- the shipped tasks -------------------------------------------------------------------------


def test_predictions_are_those_of_the_averaged_weights(tmp_path):
    store = open_store(str(tmp_path))
    job = a_job(max_steps=3)
    job.ema = Ema(job.model, 0.5)
    go_on(tmp_path, job)
    sample_outputs.show(job, 3, store)
    found = read(store, "predictions.json")
    inputs, labels = DATA.eval.tensors
    job.model.eval()
    with job.ema.in_place(), torch.no_grad():
        chances, predicted = job.model(inputs).softmax(1).max(1)
    assert [row["index"] for row in found["samples"]] == list(range(23))
    assert [row["label"] for row in found["samples"]] == labels.tolist()
    assert [row["prediction"] for row in found["samples"]] == predicted.tolist()
    assert [row["probability"] for row in found["samples"]] == pytest.approx(chances.tolist())
    confusion = [[0] * 3 for _ in range(3)]
    for label, prediction in zip(labels.tolist(), predicted.tolist(), strict=True):
        confusion[label][prediction] += 1
    assert found["confusion"] == confusion
    assert (found["confusion_samples"], found["classes"]) == (23, [0, 1, 2])
    assert read(store, "index.json")["files"] == ["predictions.json"]  # inputs are no images


def test_at_most_24_predictions_and_the_images_that_they_are_of():
    data = TensorDataset(torch.linspace(-1, 1, 150)[:, None, None, None].expand(150, 3, 4, 4),
                         torch.zeros(150, dtype=torch.int64))  # fmt: skip
    data.classes = ["cat", "dog"]
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():
        found = Classification().samples(model, data)
    assert (len(found["predictions"]["samples"]), found["predictions"]["confusion_samples"]) == (
        24, 150,
    )  # fmt: skip
    assert found["predictions"]["classes"] == ["cat", "dog"]
    assert found["images"].shape == (24, 3, 4, 4)
    assert (found["images"].min(), found["images"].max()) == (0, 255)


class Letters(TensorDataset):
    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)


def test_a_text_begins_with_the_data_and_is_the_models_from_there():
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (4, 40))
    model = GPT(vocabulary=7, context=40, layers=1, heads=1, width=8)
    found = LanguageModel().samples(model, Letters(tokens, tokens))["text"]
    assert found[:32] == Letters(tokens).decode(tokens[0, :32].tolist())
    assert len(found) == 432
    assert LanguageModel().samples(model, TensorDataset(tokens, tokens)) == {}
    assert LanguageModel().samples(nn.Linear(2, 2), Letters(tokens, tokens)) == {}


def test_images_are_made_of_the_same_noise_in_every_run():
    model = gan_job().model.eval()
    with torch.no_grad():
        first = Adversarial().samples(model, None)["images"]
        torch.manual_seed(5)
        assert torch.equal(first, Adversarial().samples(model, None)["images"])
    assert (first.shape, first.dtype) == ((64, 1, 8, 8), torch.uint8)


def test_without_data_to_evaluate_the_training_data_is_shown(tmp_path):
    task = Shows({})
    job = a_job(task=task, evaluation=None)
    sample_outputs.show(job, 1, open_store(str(tmp_path)))
    assert task.calls[0][2] is job.data.dataset
