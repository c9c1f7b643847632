"""Text as windows of tokens, from shards prepared once and memory-mapped.

A file is a document. It belongs to one split, chosen by a hash of its name.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.core import rng
from trainer.core.formatting import pluralize
from trainer.data import corpus, token_shards
from trainer.data.corpus import Corpus, Document
from trainer.data.token_shards import INDEX, VERSION, Part, Prepared
from trainer.data.tokenizer import BYTES, Tokenizer, identity, load_tokenizer
from trainer.errors import ConfigError, DataError
from trainer.storage import local_path

PARTS = ("train", "eval")


class Windows:
    """Windows of a split: sample i has the tokens i * context … i * context + context.

    The last token of a window is the first of the next one, so every token except the first is a
    target at most once. An incomplete window at the end is unused. Each process maps the files on
    first access.
    """

    def __init__(
        self, folder: Path, part: Part, dtype: str, context: int, tokenizer: str = "bytes"
    ) -> None:
        self._tokenizer = tokenizer
        self._paths = [folder / shard.file for shard in part.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in part.shards)])
        self._dtype, self._context = np.dtype(dtype).newbyteorder("<"), context
        self._mapped: dict[int, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        """Return the number of windows."""
        return max(int(self._starts[-1]) - 1, 0) // self._context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one sample: inputs and targets, (context,) int64 each."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return samples: inputs and targets, (N, context) int64 each; targets are one later.

        Raises:
            IndexError: an index is out of range.
            DataError: a shard is missing or has another length.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise IndexError(
                f"windows {numbers.min():,} … {numbers.max():,} are out of range; there are "
                f"{len(self):,}, from 0 on"
            )
        tokens = torch.from_numpy(self._read(numbers * self._context, self._context + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; those outside the vocabulary are skipped.

        Raises:
            ConfigError: the tokenizer's package or file is missing.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        return tokenizer.decode([token for token in tokens if 0 <= token < tokenizer.vocabulary])

    def __getstate__(self) -> dict[str, Any]:
        """Exclude mapped files; a worker maps them itself."""
        return {**self.__dict__, "_mapped": {}}

    def _read(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        tokens = np.empty((len(starts), length), dtype=np.int64)
        first = np.searchsorted(self._starts, starts, side="right") - 1
        last = np.searchsorted(self._starts, starts + length - 1, side="right") - 1
        is_in_one_shard = first == last
        for number in np.unique(first[is_in_one_shard]):
            rows = np.flatnonzero(is_in_one_shard & (first == number))
            windows = np.lib.stride_tricks.sliding_window_view(self._shard(number), length)
            tokens[rows] = windows[starts[rows] - self._starts[number]]
        for row in np.flatnonzero(~is_in_one_shard):  # few: about one per shard
            pieces = []
            for number in range(first[row], last[row] + 1):
                begin = starts[row] - self._starts[number]
                pieces.append(self._shard(number)[max(begin, 0) : begin + length])
            tokens[row] = np.concatenate(pieces)
        return tokens

    def _shard(self, number: int) -> npt.NDArray[Any]:
        number = int(number)
        if number not in self._mapped:
            path, count = self._paths[number], int(self._starts[number + 1] - self._starts[number])
            try:
                mapped = np.memmap(path, dtype=self._dtype, mode="r")
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path} cannot be read: {error}; recreate it with python -m trainer.prepare"
                ) from None
            if len(mapped) != count:
                raise DataError(
                    f"{path} has {len(mapped):,} tokens, but {INDEX} lists {count:,}; "
                    "recreate it with python -m trainer.prepare"
                )
            self._mapped[number] = mapped
        return self._mapped[number]


class Text:
    """Windows of tokens: inputs and targets (context,) int64, targets one token later.

    Nothing is read before `train`, `eval` or `prepare` is used. Prepared shards are stored in a
    folder and prepared again only if files, tokenizer or fractions change.

    Args:
        files: a shell pattern, with `**` for folders of any depth: local files, or s3://… and other
            URLs of fsspec, which reads its settings from the environment. None: the source of
            Python's standard library, without tests.
        context: context length in tokens.
        tokenizer: `bytes` (256 values, and 256 as the end of a document), the path of a Hugging
            Face tokenizer.json, or `tiktoken:` and an encoding whose file is in tiktoken's cache.
            A tokenizer.json without a usual end token gets an additional token.
        eval_share: approximate fraction of the documents for evaluation.
        dir: local folder for the shards; None: a folder in ~/.cache/perdure.
        shard_tokens: a shard ends with the document that reaches this many tokens.
        classes: vocabulary size of the model; None: unchecked.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        files: str | None = None,
        context: int = 256,
        tokenizer: str = "bytes",
        eval_share: float = 0.02,
        dir: str | None = None,
        shard_tokens: int = 1 << 25,
        classes: int | None = None,
    ) -> None:
        for name, value in (("context", context), ("shard_tokens", shard_tokens)):
            if value < 1:
                raise ConfigError(f"data.{name}={value} is too small (nearest: 1)")
        if not 0 < eval_share < 1:
            raise ConfigError(f"data.eval_share={eval_share} must be above 0 and below 1")
        if dir is not None and local_path(dir) is None:
            raise ConfigError(f"data.dir={dir}: shards are memory-mapped; use a local folder")
        if not tokenizer or files == "":
            raise ConfigError(f"data.{'files' if files == '' else 'tokenizer'} is empty")
        self._files, self._context, self._tokenizer = files, context, tokenizer
        self._eval_share, self._dir, self._shard_tokens = eval_share, dir, shard_tokens
        self._classes = classes

    @cached_property
    def train(self) -> Windows:
        """Training windows; prepares the shards if needed.

        Raises:
            DataError: the files cannot be used, or are too few.
            ConfigError: the tokenizer is unusable, or has more tokens than `classes`.
        """
        return self._windows("train")

    @cached_property
    def eval(self) -> Windows:
        """Evaluation windows; raises as `train`."""
        return self._windows("eval")

    @property
    def vocabulary(self) -> int:
        """Vocabulary size including the end-of-document token; prepares nothing."""
        if self._tokenizer == "bytes":
            return BYTES.vocabulary
        prepared = self._prepared or token_shards.read_index(self._folder, self._digest)
        return prepared.vocabulary if prepared else self._loaded.vocabulary

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token of the evaluation documents."""
        part = self.prepare().parts["eval"]
        return part.bytes / part.tokens

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all listed documents."""
        return sum(document.size_bytes for document in self._corpus.documents)

    def prepare(
        self,
        log: Callable[[str], None] | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> Prepared:
        """Create missing shards and return all of them.

        Many processes may call it at once, and it may be killed: finished shards are reused.

        Args:
            log: called with a line per shard.
            advance: called with the bytes of each finished document.

        Raises:
            DataError: the files cannot be used, or `dir` has other shards.
            ConfigError: the tokenizer is unusable, or has more tokens than `classes`.
        """
        if self._prepared is None:
            log, advance = log or _ignore, advance or _ignore
            self._prepared = token_shards.read_index(self._folder, self._digest)
            if self._prepared is None:
                self._prepared = self._prepare(log, advance)
        if self._classes is not None and self._prepared.vocabulary > self._classes:
            vocabulary = self._prepared.vocabulary
            raise ConfigError(
                f"data.tokenizer={self._tokenizer} has {vocabulary:,} tokens, data.classes is "
                f"{self._classes:,}; set sample.classes={vocabulary}"
            )
        return self._prepared

    _prepared: Prepared | None = None

    def _windows(self, name: str) -> Windows:
        prepared = self.prepare()
        part = prepared.parts[name]
        windows = Windows(prepared.folder, part, prepared.dtype, self._context, self._tokenizer)
        if not len(windows):
            change = "raise" if name == "eval" else "lower"
            raise DataError(
                f"the {name} split has {part.tokens:,} tokens, but a window of "
                f"data.context={self._context} needs {self._context + 1:,}; lower data.context, "
                f"{change} data.eval_share, or add files"
            )
        return windows

    @cached_property
    def _corpus(self) -> Corpus:
        if self._files is None:
            return corpus.standard_library()
        path = local_path(self._files)
        prepared = corpus.local_files(str(path)) if path else corpus.remote_files(self._files)
        if not prepared.documents:
            raise DataError(
                f"data.files={self._files}: no such files; use a pattern of files, for "
                "example 'data/books/**/*.txt'"
            )
        return prepared

    @cached_property
    def _split(self) -> dict[str, list[Document]]:
        positions = {d.name: _position(d.name) for d in self._corpus.documents}
        split: dict[str, list[Document]] = {part: [] for part in PARTS}
        for document in self._corpus.documents:
            is_eval = positions[document.name] < self._eval_share
            split["eval" if is_eval else "train"].append(document)
        for part, word in (("train", "lower"), ("eval", "raise")):
            if not split[part]:
                edge = max(positions.values()) if part == "train" else min(positions.values())
                rounded = math.floor(edge * 1000) if part == "train" else math.ceil(edge * 1000)
                advice = f"{word} data.eval_share (nearest: {rounded / 1000}), or add files"
                if len(positions) == 1:
                    advice = "a document belongs to one split: divide the file into several"
                raise DataError(
                    f"data.eval_share={self._eval_share} leaves nothing to "
                    f"{'train' if part == 'train' else 'evaluate'} on: data.files has "
                    f"{pluralize(len(positions), 'document')}; {advice}"
                )
        return split

    @cached_property
    def _loaded(self) -> Tokenizer:
        return load_tokenizer(self._tokenizer)

    @cached_property
    def _digest(self) -> str:
        """Digest of everything that determines the tokens in the shards."""
        settings = [VERSION, identity(self._tokenizer), self._eval_share, self._shard_tokens]
        files = [[d.name, d.size_bytes, d.stamp] for d in self._corpus.documents]
        text = json.dumps([settings, files]).encode()
        return hashlib.blake2b(text, digest_size=10).hexdigest()

    @cached_property
    def _folder(self) -> Path:
        if self._dir is not None and (path := local_path(self._dir)) is not None:
            return path.expanduser()
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # a user without an entry in the system
            raise ConfigError("no home directory for a cache; set data.dir") from None
        return Path(cache, "perdure", f"text-{self._digest}")

    def _prepare(self, log: Callable[[str], None], advance: Callable[[int], object]) -> Prepared:
        folder, split = self._folder, self._split
        token_shards.reject_other_shards(folder, self._digest)
        tokenizer = self._loaded
        dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
        make = token_shards.ShardMaker(
            folder, self._digest, tokenizer, dtype, self._shard_tokens, self._corpus.read, advance
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with token_shards.lock(folder, log) as is_locked:
                prepared = token_shards.read_index(folder, self._digest)
                if prepared is not None:  # another process was faster
                    return prepared
                if is_locked:
                    token_shards.clear_temporaries(folder)
                parts = {part: make.part(part, split[part], log) for part in PARTS}
                prepared = Prepared(folder, self._tokenizer, tokenizer.vocabulary, dtype, parts)
                token_shards.write_index(prepared, self._digest, tokenizer.end)
        except OSError as error:
            raise DataError(
                f"{folder} cannot be written: {error.strerror or error}; free some space, or "
                "set data.dir to another local folder"
            ) from None
        return prepared


def _ignore(_: object) -> None:
    pass


def _position(name: str) -> float:
    """Return the hash of a document's name as a number in 0 … 1."""
    # File names are bytes; parts that are not UTF-8 need escapes.
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return rng.derive("text", text) / (1 << 63)
