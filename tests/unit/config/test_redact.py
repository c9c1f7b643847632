"""Stored form of a configuration: no secrets, no values of the environment."""

import json

import pytest
from omegaconf import OmegaConf

from trainer.config.redact import stored


@pytest.mark.parametrize("key", [
    "password", "db_password", "passwd", "passphrase", "secret", "client_secret", "credentials",
    "api_key", "apiKey", "wandb_api_key", "access_key", "aws_secret_access_key", "secret_key",
    "private_key", "token", "hf_token", "auth_token", "HF_TOKEN", "hfToken",
    "accessToken", "pwd", "secrets",
])  # fmt: skip
@pytest.mark.parametrize("value", ["hunter2", 12345, ["hunter2"], {"a": "hunter2"}])
def test_stored_redacts_secrets_at_every_depth(key, value):
    node = OmegaConf.create({key: value, "a": [{"b": {key: value}}]})
    assert stored(node) == {key: "<redacted>", "a": [{"b": {key: "<redacted>"}}]}


@pytest.mark.parametrize("key", [
    "max_tokens", "global_batch_tokens", "tokens", "token_count", "num_tokens", "tokenizer",
    "bytes_per_token",
    "pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "pad_token_id", "key",
    "monkey", "secretary", "keep_last", "n_tokens", "dataset_key",
])  # fmt: skip
def test_stored_keeps_values_that_are_not_secrets(key):
    assert stored(OmegaConf.create({key: 5})) == {key: 5}


def test_stored_keeps_null_secrets():
    assert stored(OmegaConf.create({"hf_token": None})) == {"hf_token": None}


def test_stored_never_contains_values_of_environment_variables(monkeypatch):
    monkeypatch.setenv("PERDURE_TEST", "hunter2")
    node = OmegaConf.create(
        {
            "direct": "${oc.env:PERDURE_TEST}",
            "inside": "x-${oc.env:PERDURE_TEST,default}",
            "reference": "${direct}",
            "part": "before ${direct} after",
            "chain": "${reference}",
            "many": ["${direct}", {"deep": "${..[0]}"}],
            "all": "${group}",
            "group": {"x": "${oc.env:PERDURE_TEST}"},
            "decoded": "${oc.decode:${oc.env:PERDURE_TEST}}",
            "values": "${oc.dict.values:group}",
            "plain": 3,
            "resolved": "${plain}",
        }
    )
    assert node.part == "before hunter2 after"  # the value is there to leak
    assert node["values"] == ["hunter2"]
    content = stored(node)
    assert "hunter2" not in json.dumps(content)
    assert content["direct"] == content["reference"] == content["chain"] == "${oc.env:PERDURE_TEST}"
    assert content["inside"] == "x-${oc.env:PERDURE_TEST,default}"
    assert content["part"] == "before ${oc.env:PERDURE_TEST} after"
    assert content["all"] == content["group"] == {"x": "${oc.env:PERDURE_TEST}"}
    assert content["resolved"] == 3


def test_stored_redacts_references_to_secrets():
    node = OmegaConf.create(
        {"model": {"hf_token": "hunter2"}, "data": {"login": "${model.hf_token}"}}
    )
    assert stored(node)["data"] == {"login": "<redacted>"}


def test_stored_keeps_resolvers_of_environment_variables_as_text(monkeypatch):
    monkeypatch.setenv("PERDURE_TEST", "7")
    OmegaConf.register_new_resolver("perdure_twice", lambda n: 2 * int(n))
    try:
        node = OmegaConf.create({"n": "${oc.env:PERDURE_TEST}", "m": "${perdure_twice:${n}}"})
        assert node.m == 14
        assert stored(node) == {"n": "${oc.env:PERDURE_TEST}", "m": "${perdure_twice:${n}}"}
    finally:
        OmegaConf.clear_resolver("perdure_twice")


def test_stored_is_plain_json_with_text_keys():
    node = OmegaConf.create({"a": {1: [1.5, None, True, "x"]}, "b": "${a}"})
    content = stored(node)
    assert content == {"a": {"1": [1.5, None, True, "x"]}, "b": {"1": [1.5, None, True, "x"]}}
    assert json.loads(json.dumps(content)) == content
