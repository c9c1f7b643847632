"""Normal form of paths and URLs."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.core.locations import is_remote, normalized

NAMES = st.text("ab .=é-_()", min_size=1, max_size=6).filter(lambda name: name.strip(". "))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("runs/a/", "runs/a"),
        ("runs//a", "runs/a"),
        ("./runs/./a", "runs/a"),
        ("runs/../a", "runs/../a"),
        ("/", "/"),
        ("///", "/"),
        (".", "."),
        ("", ""),
        ("runs/my run (1)=é", "runs/my run (1)=é"),
        ("file:///data/a/", "/data/a"),
        ("file:/data/a", "/data/a"),
        ("file://localhost/data", "/data"),
        ("FILE:///data", "/data"),
        ("s3://bucket/a//b/", "s3://bucket/a/b"),
        ("S3://bucket/a", "s3://bucket/a"),
        ("memory:///a/", "memory:///a"),
        ("https://host/a//b", "https://host/a//b"),
        ("auto", "auto"),
        ("10", "10"),
        ("runs/a:b", "runs/a:b"),
        ("C:runs", "C:runs"),
    ],
)
def test_normalized_gives_one_spelling_per_place(written, expected):
    assert normalized(written) == expected
    assert normalized(expected) == expected


def test_normalized_expands_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert normalized("~/runs/") == "/home/someone/runs"
    assert normalized("~") == "/home/someone"
    assert normalized("file:~/runs") == "/home/someone/runs"
    assert normalized("runs/~") == "runs/~"


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        ("s3:/bucket/a", "write s3://bucket/a, or ./s3:/bucket/a for a local path"),
        ("S3:/bucket/a", "write s3://bucket/a"),
        ("s3:bucket/a", "write s3://bucket/a"),
        ("gs:/bucket", "write gs://bucket"),
        ("mine:/bucket", "write mine://bucket"),
        ("s3:///bucket/../a", "contains . or .."),
        ("s3://bucket/./a", "contains . or .."),
        ("~unknown-user-name/a", "no home directory of ~unknown-user-name"),
    ],
)
def test_normalized_rejects_what_only_looks_like_a_place(written, advice):
    with pytest.raises(ValueError, match=re.escape(advice)) as raised:
        normalized(written)
    assert repr(written) in str(raised.value)


@given(st.lists(NAMES, min_size=1, max_size=4), st.booleans(), st.sampled_from(["", "/", "//"]))
def test_normalized_names_the_same_file_as_the_operating_system(names, is_absolute, end):
    written = "/" * is_absolute + "//".join(names) + end
    assert os.path.normpath(normalized(written)) == os.path.normpath(Path(written))
    assert not is_remote(normalized(written))
