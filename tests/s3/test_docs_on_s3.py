"""Documented commands with S3 URLs, run on a real server."""

import re
import subprocess

import pytest
from support import documents

from scripts.s3_server import BUCKET
from trainer.checkpoint import lineage
from trainer.storage import open_store

COMMANDS = [words for document in documents.DOCUMENTS for words in documents.typed(document, "s3")]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_document_command_runs(s3, command, number):
    address = s3.environment["AWS_ENDPOINT_URL"]
    words = [
        re.sub("s3://[a-z]+/", f"s3://{BUCKET}/document-{number}/", word)
        .replace("https://host:9000", address)
        .replace("/local/", f"{command.folder}/local/")
        for word in COMMANDS[number]
    ]
    env, words = documents.to_run(documents.shorter(words))
    env |= {**command.env, **s3.environment}
    if any(address in word for word in words):
        del env["AWS_ENDPOINT_URL"]  # the command sets it
    done = subprocess.run(
        words, cwd=command.folder, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    url = next(word for word in reversed(words) if "s3://" in word).partition("=")[2]
    assert [commit.step for commit in lineage.commits(open_store(url))] == [2]
