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

_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Usual end-of-document tokens; the first one in a tokenizer.json is used."""


@dataclass(frozen=True)
class Tokenizer:
    """Vocabulary and conversion between bytes, tokens and text."""

    vocabulary: int
    end: int
    """End-of-document token."""
    encode: Callable[[bytes], npt.NDArray[Any]]
    decode: Callable[[Sequence[int]], str]


def _encode_bytes(data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, dtype=np.uint8)


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


BYTES = Tokenizer(vocabulary=257, end=256, encode=_encode_bytes, decode=_decode_bytes)


def identity(name: str) -> str:
    """Return the identity of a tokenizer: its name, or the digest of its file."""
    if name == "bytes" or name.startswith("tiktoken:"):
        return name
    try:
        return hashlib.blake2b(Path(name).expanduser().read_bytes(), digest_size=16).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer={name} cannot be read: {error.strerror}; use bytes, the path of a "
            "tokenizer.json, or tiktoken:<encoding>"
        ) from None


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer named by `data.tokenizer`.

    Raises:
        ConfigError: its package or file is missing or unusable.
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
        library_tokenizer = package.Tokenizer.from_file(str(Path(name).expanduser()))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(
            f"data.tokenizer={name} is not a tokenizer.json that {package.__name__} "
            f"{package.__version__} can read: {error}"
        ) from None
    library_tokenizer.no_truncation()
    library_tokenizer.no_padding()
    with suppress(AttributeError):  # older versions
        library_tokenizer.encode_special_tokens = True  # text that spells an end token is not one
    ids = library_tokenizer.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    end = next((ids[token] for token in _END_TOKENS if token in ids), size)

    def encode(data: bytes) -> npt.NDArray[Any]:
        text = data.decode(errors="replace")
        return np.asarray(
            library_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32
        )

    def decode(tokens: Sequence[int]) -> str:
        return str(library_tokenizer.decode(list(tokens), skip_special_tokens=False))

    return Tokenizer(max(size, end + 1), end, encode, decode)


def _load_tiktoken(name: str) -> Tokenizer:
    package = _package("tiktoken", name)
    load: Any = importlib.import_module("tiktoken.load")
    encoding = name.partition(":")[2]
    if encoding not in package.list_encoding_names():
        valid = ", ".join(package.list_encoding_names())
        raise ConfigError(f"data.tokenizer={name}: no such encoding (valid: {valid})")

    def reject_download(url: str) -> bytes:
        raise ConfigError(
            f"data.tokenizer={name}: its file {url} is not in tiktoken's cache and is never "
            "downloaded; load the encoding once on a machine with a network and copy the folder "
            "TIKTOKEN_CACHE_DIR"
        )

    # The library downloads uncached files and has no setting against it; every rank on every node
    # would do so during a job.
    download, load.read_file = load.read_file, reject_download
    try:
        library_tokenizer = package.get_encoding(encoding)
    finally:
        load.read_file = download

    def encode(data: bytes) -> npt.NDArray[Any]:
        text = data.decode(errors="replace")
        return np.asarray(library_tokenizer.encode_ordinary(text), dtype=np.uint32)

    def decode(tokens: Sequence[int]) -> str:
        pieces = []
        for token in tokens:
            with suppress(KeyError):  # not a token
                pieces.append(library_tokenizer.decode_single_token_bytes(token))
        return b"".join(pieces).decode(errors="replace")

    return Tokenizer(library_tokenizer.n_vocab, library_tokenizer.eot_token, encode, decode)
