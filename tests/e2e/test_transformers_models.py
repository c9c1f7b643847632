"""Models of transformers, built from their configurations alone."""

import json

import pytest
import torch
from hydra.utils import instantiate

from trainer.config import targets
from trainer.task import Classification, LanguageModel

transformers = pytest.importorskip("transformers")

GPT2 = {
    "_target_": "transformers.AutoModelForCausalLM.from_config",
    "config": {
        "_target_": "transformers.GPT2Config", "vocab_size": 257, "n_positions": 16, "n_embd": 16,
        "n_layer": 1, "n_head": 2,
    },
}  # fmt: skip
VIT = {
    "_target_": "transformers.ViTForImageClassification",
    "config": {
        "_target_": "transformers.ViTConfig", "image_size": 8, "patch_size": 4, "num_channels": 1,
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "num_labels": 10,
    },
}  # fmt: skip


def test_check_target_validates_transformers_targets():
    assert targets.check_target(GPT2, "model") == []
    assert targets.check_target(VIT, "model") == []
    wrong = {**VIT, "config": {**VIT["config"], "_target_": "transformers.VitConfig"}}
    assert "transformers has no 'VitConfig'" in targets.check_target(wrong, "model")[0].text


def test_language_model_matches_plain_logits():
    model = instantiate(GPT2).eval()
    tokens = torch.randint(0, 257, (2, 16))
    loss, logits = LanguageModel().loss(model, (tokens, tokens.roll(-1, 1)))
    assert torch.equal(logits, model(tokens).logits)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())
    torch.testing.assert_close(loss, expected)


def test_classifier_matches_plain_logits():
    model = instantiate(VIT).eval()
    images = torch.randn(3, 1, 8, 8)
    _, logits = Classification().loss(model, (images, torch.tensor([1, 2, 3])))
    assert torch.equal(logits, model(images).logits)


@pytest.mark.parametrize(("node", "overrides"), [
    (GPT2, ["data=text", "data.files='{corpus}/*.txt'", "data.eval_share=0.3", "sample.shape=[16]",
            "task=language_model"]),
    pytest.param(VIT, ["data=digits"], marks=pytest.mark.slow),
], ids=["gpt2", "vit"])  # fmt: skip
def test_transformers_model_trains_stops_and_resumes(command, node, overrides):
    corpus = command.folder / "corpus"
    corpus.mkdir()
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"{number} words and some more of them. " * 20)
    model = json.dumps(node).replace('"', "").replace(" ", "")
    arguments = [
        "~model", f"+model={model}", *(text.format(corpus=corpus) for text in overrides), "name=a",
        "trainer.max_epochs=null", "trainer.global_batch_size=8", "optimizer=adamw",
    ]  # fmt: skip
    cache = {"XDG_CACHE_HOME": str(command.folder / "cache")}
    for steps in (2, 4):
        done = command(*arguments, f"trainer.max_steps={steps}", **cache)
        assert done.returncode == 0, done.stderr
        assert f"Finished at step {steps}" in done.stdout
    assert "resuming from step 2" in done.stdout
    done = command("runs/a", module="trainer.export")
    assert done.returncode == 0, done.stderr
