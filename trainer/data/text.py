"""Text as windows of tokens, from shards that are prepared once and then mapped into memory.

A file is a document. It goes whole to one part, by a hash of its name.
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
    """Windows of a part: sample i has the tokens i * context … i * context + context.

    The last token of a window is the first of the next one, so every token but the first is a
    target at most once. What is left at the end, less than a window, is not used. The files are
    mapped when a sample is first asked for, in each process by itself.
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
            IndexError: there is no such sample.
            DataError: a shard is gone, or has another length.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"windows {wanted.min():,} … {wanted.max():,} were asked for, there are "
                f"{len(self):,}, from 0 on"
            )
        tokens = torch.from_numpy(self._take(wanted * self._context, self._context + 1))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; what is not in the vocabulary is left out.

        Raises:
            ConfigError: the tokenizer's package or file is not there.
        """
        tokenizer = load_tokenizer(self._tokenizer)
        return tokenizer.decode([token for token in tokens if 0 <= token < tokenizer.vocabulary])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped files out: a worker maps them itself instead of copying them."""
        return {**self.__dict__, "_mapped": {}}

    def _take(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        taken = np.empty((len(starts), length), dtype=np.int64)
        first = np.searchsorted(self._starts, starts, side="right") - 1
        last = np.searchsorted(self._starts, starts + length - 1, side="right") - 1
        whole = first == last
        for number in np.unique(first[whole]):
            rows = np.flatnonzero(whole & (first == number))
            windows = np.lib.stride_tricks.sliding_window_view(self._shard(number), length)
            taken[rows] = windows[starts[rows] - self._starts[number]]
        for row in np.flatnonzero(~whole):  # few: about one for each shard
            pieces = []
            for number in range(first[row], last[row] + 1):
                begin = starts[row] - self._starts[number]
                pieces.append(self._shard(number)[max(begin, 0) : begin + length])
            taken[row] = np.concatenate(pieces)
        return taken

    def _shard(self, number: int) -> npt.NDArray[Any]:
        number = int(number)
        if number not in self._mapped:
            path, count = self._paths[number], int(self._starts[number + 1] - self._starts[number])
            try:
                mapped = np.memmap(path, dtype=self._dtype, mode="r")
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{path} cannot be read: {error}; python -m trainer.prepare makes it again"
                ) from None
            if len(mapped) != count:
                raise DataError(
                    f"{path} has {len(mapped):,} tokens, {INDEX} says {count:,}; "
                    "python -m trainer.prepare makes it again"
                )
            self._mapped[number] = mapped
        return self._mapped[number]


class Text:
    """Windows of tokens: inputs and targets (context,) int64, targets one token later.

    Nothing is read before `train`, `eval` or `prepare` is asked for. What they prepare lies in a
    folder, and is prepared again only when files, tokenizer or shares change.

    Args:
        files: a pattern as in a shell, with `**` for folders of any depth: local files, or
            s3://… and other URLs of fsspec, which takes its settings from the environment. None:
            the source of Python's own library, its tests left out.
        context: tokens that the model sees at once.
        tokenizer: `bytes` (256 values, and 256 as the end of a document), the path of a Hugging
            Face tokenizer.json, or `tiktoken:` and an encoding whose file is in tiktoken's cache.
            A tokenizer.json without a usual end token gets one more token.
        eval_share: share of the documents that is evaluated on, about.
        dir: local folder for the shards; None: one of its own in ~/.cache/perdure.
        shard_tokens: a shard ends with the document that reaches so many.
        classes: number of tokens of the model; None: it is not checked.

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
            raise ConfigError(f"data.dir={dir}: shards are mapped into memory; give a local folder")
        if not tokenizer or files == "":
            raise ConfigError(f"data.{'files' if files == '' else 'tokenizer'} is empty")
        self._files, self._context, self._tokenizer = files, context, tokenizer
        self._eval_share, self._dir, self._shard_tokens = eval_share, dir, shard_tokens
        self._classes = classes

    @cached_property
    def train(self) -> Windows:
        """The windows to train on; prepares them where that was not done.

        Raises:
            DataError: the files cannot be used, or are too few.
            ConfigError: the tokenizer cannot be used, or has more tokens than `classes`.
        """
        return self._windows("train")

    @cached_property
    def eval(self) -> Windows:
        """The windows to evaluate on; as `train`."""
        return self._windows("eval")

    @property
    def vocabulary(self) -> int:
        """Number of tokens, that which ends a document among them; prepares nothing."""
        if self._tokenizer == "bytes":
            return BYTES.vocabulary
        found = self._prepared or token_shards.read_index(self._folder, self._digest)
        return found.vocabulary if found else self._loaded.vocabulary

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the documents to evaluate on, for each of their tokens."""
        part = self.prepare().parts["eval"]
        return part.bytes / part.tokens

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all documents, by the listing."""
        return sum(document.size_bytes for document in self._corpus.documents)

    def prepare(
        self,
        say: Callable[[str], None] | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> Prepared:
        """Make the shards that are not there yet; return what is there then.

        May be called by many processes at once, and killed: finished shards are kept.

        Args:
            say: called with a line for each shard.
            advance: called with the bytes of each document that is done.

        Raises:
            DataError: the files cannot be used, or `dir` has shards of others.
            ConfigError: the tokenizer cannot be used, or has more tokens than `classes`.
        """
        if self._prepared is None:
            say, advance = say or _ignore, advance or _ignore
            self._prepared = token_shards.read_index(self._folder, self._digest)
            if self._prepared is None:
                self._prepared = self._prepare(say, advance)
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
                f"the {name} part has {part.tokens:,} tokens, a window of "
                f"data.context={self._context} needs {self._context + 1:,}; lower data.context, "
                f"{change} data.eval_share, or give more files"
            )
        return windows

    @cached_property
    def _corpus(self) -> Corpus:
        if self._files is None:
            return corpus.standard_library()
        path = local_path(self._files)
        found = corpus.local_files(str(path)) if path else corpus.remote_files(self._files)
        if not found.documents:
            raise DataError(
                f"data.files={self._files}: there is no such file; give a pattern of files, for "
                "example 'data/books/**/*.txt'"
            )
        return found

    @cached_property
    def _split(self) -> dict[str, list[Document]]:
        places = {d.name: _place(d.name) for d in self._corpus.documents}
        split: dict[str, list[Document]] = {part: [] for part in PARTS}
        for document in self._corpus.documents:
            is_eval = places[document.name] < self._eval_share
            split["eval" if is_eval else "train"].append(document)
        for part, word in (("train", "lower"), ("eval", "raise")):
            if not split[part]:
                edge = max(places.values()) if part == "train" else min(places.values())
                rounded = math.floor(edge * 1000) if part == "train" else math.ceil(edge * 1000)
                advice = f"{word} data.eval_share (nearest: {rounded / 1000}), or give more files"
                if len(places) == 1:
                    advice = "a document goes whole to one part: cut the file into several"
                raise DataError(
                    f"data.eval_share={self._eval_share} leaves nothing to "
                    f"{'train' if part == 'train' else 'evaluate'} on: data.files has "
                    f"{pluralize(len(places), 'document')}; {advice}"
                )
        return split

    @cached_property
    def _loaded(self) -> Tokenizer:
        return load_tokenizer(self._tokenizer)

    @cached_property
    def _digest(self) -> str:
        """Digest of all that decides the tokens in the shards."""
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
        except RuntimeError:  # a user whom the system does not know
            raise ConfigError("there is no home directory for a cache; give data.dir") from None
        return Path(cache, "perdure", f"text-{self._digest}")

    def _prepare(self, say: Callable[[str], None], advance: Callable[[int], object]) -> Prepared:
        folder, split = self._folder, self._split
        token_shards.refuse_others(folder, self._digest)
        tokenizer = self._loaded
        dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
        make = token_shards.Maker(
            folder, self._digest, tokenizer, dtype, self._shard_tokens, self._corpus.read, advance
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with token_shards.alone(folder, say) as is_alone:
                found = token_shards.read_index(folder, self._digest)
                if found is not None:  # by another process, meanwhile
                    return found
                if is_alone:
                    token_shards.clear_temporaries(folder)
                parts = {part: make.part(part, split[part], say) for part in PARTS}
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


def _place(name: str) -> float:
    """Return a number in 0 … 1 that is a pure function of a document's name."""
    # Names are bytes to the file system; what is not UTF-8 in them cannot be encoded as it is.
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return rng.derive("text", text) / (1 << 63)
