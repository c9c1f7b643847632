"""Tokenizers: bytes, tokenizer.json, tiktoken; from local files alone."""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Tokens that end a document, of which a tokenizer.json has at most one in use."""


@dataclass(frozen=True)
class Tokenizer:
    """What makes tokens of bytes, and text of tokens."""

    vocabulary: int
    end: int
    """Token after each document."""
    encode: Callable[[bytes], npt.NDArray[Any]]
    decode: Callable[[Sequence[int]], str]


def _encode_bytes(data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, dtype=np.uint8)


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


BYTES = Tokenizer(vocabulary=257, end=256, encode=_encode_bytes, decode=_decode_bytes)


def identity(name: str) -> str:
    """Return what makes a tokenizer the same one: for a file, what is in it."""
    if name == "bytes" or name.startswith("tiktoken:"):
        return name
    try:
        return hashlib.blake2b(Path(name).expanduser().read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={name} cannot be read: {error.strerror}; give bytes, the path of a "
            "tokenizer.json, or tiktoken:<encoding>"
        ) from None


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer that `data.tokenizer` names.

    Raises:
        ConfigError: its package or file is not there, or cannot be used.
    """
    if name == "bytes":
        return BYTES
    if name.startswith("tiktoken:"):
        return _load_tiktoken(name)
    return _load_json(name)


def _package(name: str, tokenizer: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"data.tokenizer={tokenizer} needs the package {name}: {error}; pip install "
            "'perdure[text]', or use data.tokenizer=bytes"
        ) from None


def _load_json(name: str) -> Tokenizer:
    package = _package("tokenizers", name)
    try:
        inner = package.Tokenizer.from_file(str(Path(name).expanduser()))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(
            f"data.tokenizer={name} is no tokenizer.json that {package.__name__} "
            f"{package.__version__} can read: {error}"
        ) from None
    inner.no_truncation()
    inner.no_padding()
    with suppress(AttributeError):  # older versions
        inner.encode_special_tokens = True  # a document that names the end does not end there
    ids = inner.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    end = next((ids[token] for token in _ENDS if token in ids), size)

    def encode(data: bytes) -> npt.NDArray[Any]:
        text = data.decode(errors="replace")
        return np.asarray(inner.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(tokens: Sequence[int]) -> str:
        return str(inner.decode(list(tokens), skip_special_tokens=False))

    return Tokenizer(max(size, end + 1), end, encode, decode)


def _load_tiktoken(name: str) -> Tokenizer:
    package = _package("tiktoken", name)
    load: Any = importlib.import_module("tiktoken.load")
    encoding = name.partition(":")[2]
    if encoding not in package.list_encoding_names():
        valid = ", ".join(package.list_encoding_names())
        raise ConfigError(f"data.tokenizer={name}: there is no such encoding (valid: {valid})")

    def refuse(place: str) -> bytes:
        raise ConfigError(
            f"data.tokenizer={name}: its file {place} is not in tiktoken's cache, and is not "
            "downloaded here; load the encoding once where there is a network, and copy the folder "
            "TIKTOKEN_CACHE_DIR"
        )

    # The library downloads what it has not cached, and has no setting against that; every rank
    # on every node would, in the middle of a job.
    download, load.read_file = load.read_file, refuse
    try:
        inner = package.get_encoding(encoding)
    finally:
        load.read_file = download

    def encode(data: bytes) -> npt.NDArray[Any]:
        text = data.decode(errors="replace")
        return np.asarray(inner.encode_ordinary(text), dtype=np.uint32)

    def decode(tokens: Sequence[int]) -> str:
        pieces = []
        for token in tokens:
            with suppress(KeyError):  # a number that no token has
                pieces.append(inner.decode_single_token_bytes(token))
        return b"".join(pieces).decode(errors="replace")

    return Tokenizer(inner.n_vocab, inner.eot_token, encode, decode)
