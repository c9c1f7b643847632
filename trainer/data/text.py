"""Text as windows of tokens, from shards that are prepared once and then mapped into memory.

A file is a document. It goes whole to one part, by a hash of its name. The shards of a part are
its documents in the order of their names, each followed by a token that ends it.
"""

import fcntl
import glob
import hashlib
import importlib
import json
import math
import os
import secrets
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer import rng
from trainer.errors import ConfigError, DataError
from trainer.storage import is_local

PARTS = ("train", "eval")
_VERSION = 1
_INDEX = "index.json"
_TEMPORARY = ".tmp-"
_NOT_IN_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""Tokens that end a document, of which a tokenizer.json has at most one in use."""
_STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
_FOREIGN = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs")
"""Libraries whose exceptions are the server's or the network's, not bugs of ours."""


# --- what is prepared --------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A finished file of tokens."""

    file: str
    """Name in the folder."""
    tokens: int
    """The ends of the documents among them."""
    documents: int
    bytes: int
    """Of the documents' files."""


@dataclass(frozen=True)
class Part:
    """The shards of one part, in order, and their sums."""

    shards: list[Shard]
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Prepared:
    """A folder of shards, as its `index.json` describes it."""

    folder: Path
    tokenizer: str
    vocabulary: int
    dtype: str
    """`uint16` or `uint32`, both little-endian."""
    parts: dict[str, Part]


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
        tokenizer = _load_tokenizer(self._tokenizer)
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
                    f"{path} has {len(mapped):,} tokens, {_INDEX} says {count:,}; "
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
        if dir is not None and not is_local(dir):
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
            return _BYTES.vocabulary
        found = self._prepared or _read_index(self._folder, self._digest)
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
            self._prepared = _read_index(self._folder, self._digest)
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
    def _corpus(self) -> "_Corpus":
        if self._files is None:
            return _standard_library()
        found = (_local_files if is_local(self._files) else _remote_files)(self._files)
        if not found.documents:
            raise DataError(
                f"data.files={self._files}: there is no such file; give a pattern of files, for "
                "example 'data/books/**/*.txt'"
            )
        return found

    @cached_property
    def _split(self) -> dict[str, list["_Document"]]:
        places = {d.name: _place(d.name) for d in self._corpus.documents}
        split: dict[str, list[_Document]] = {part: [] for part in PARTS}
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
                    f"{len(places):,} document{'s' * (len(places) != 1)}; {advice}"
                )
        return split

    @cached_property
    def _loaded(self) -> "_Tokenizer":
        return _load_tokenizer(self._tokenizer)

    @cached_property
    def _digest(self) -> str:
        """Digest of all that decides the tokens in the shards."""
        settings = [_VERSION, _identity(self._tokenizer), self._eval_share, self._shard_tokens]
        files = [[d.name, d.size_bytes, d.stamp] for d in self._corpus.documents]
        text = json.dumps([settings, files]).encode()
        return hashlib.blake2b(text, digest_size=10).hexdigest()

    @cached_property
    def _folder(self) -> Path:
        if self._dir is not None:
            return Path(self._dir.removeprefix("file://")).expanduser()
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # a user whom the system does not know
            raise ConfigError("there is no home directory for a cache; give data.dir") from None
        return Path(cache, "perdure", f"text-{self._digest}")

    def _prepare(self, say: Callable[[str], None], advance: Callable[[int], object]) -> Prepared:
        folder, split = self._folder, self._split
        _refuse_others(folder, self._digest)
        tokenizer = self._loaded
        dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
        make = _Maker(
            folder, self._digest, tokenizer, dtype, self._shard_tokens, self._corpus.read, advance
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _alone(folder, say) as is_alone:
                found = _read_index(folder, self._digest)
                if found is not None:  # by another process, meanwhile
                    return found
                if is_alone:
                    _clear_temporaries(folder)
                parts = {part: make.part(part, split[part], say) for part in PARTS}
                prepared = Prepared(folder, self._tokenizer, tokenizer.vocabulary, dtype, parts)
                _write_index(prepared, self._digest, tokenizer.end)
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


# --- shards ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maker:
    """Makes the shards of a part, or finds that they are there."""

    folder: Path
    digest: str
    tokenizer: "_Tokenizer"
    dtype: str
    shard_tokens: int
    read: "Callable[[_Document], bytes]"
    advance: Callable[[int], object]

    def part(self, name: str, documents: "Sequence[_Document]", say: Callable[[str], None]) -> Part:
        shards: list[Shard] = []
        done = 0
        while done < len(documents):
            file = f"{name}-{len(shards):05d}.bin"
            shard = self._finished(file, done)
            if shard is None:
                shard = self._write(file, documents, done)
                say(f"{file}: {shard.documents:,} documents, {shard.tokens:,} tokens")
            else:
                self.advance(shard.bytes)
                say(f"{file}: is there already")
            shards.append(shard)
            done += shard.documents
        tokens, count_bytes = sum(s.tokens for s in shards), sum(s.bytes for s in shards)
        return Part(shards, len(documents), tokens, count_bytes)

    def _finished(self, file: str, first: int) -> Shard | None:
        """Return the record of a shard that is there whole and begins with document `first`."""
        record = _read_json(self._record_path(file))
        if record.get("digest") != self.digest or record.get("first") != first:
            return None
        shard = Shard(**record["shard"])
        return shard if _is_whole(self.folder, shard, self.dtype) else None

    def _write(self, file: str, documents: "Sequence[_Document]", first: int) -> Shard:
        dtype = np.dtype(self.dtype).newbyteorder("<")
        end = np.array([self.tokenizer.end], dtype).tobytes()
        count = tokens = count_bytes = 0
        with _new_file(self.folder / file) as out:
            while tokens < self.shard_tokens and first + count < len(documents):
                document = documents[first + count]
                data = self.read(document)
                if len(data) != document.size_bytes:
                    raise DataError(
                        f"{document.path} has {len(data):,} bytes, it had "
                        f"{document.size_bytes:,} when the files were listed; run again when "
                        "nobody writes to it"
                    )
                encoded = self.tokenizer.encode(data)
                out.write(encoded.astype(dtype).tobytes())
                out.write(end)
                tokens += len(encoded) + 1
                count_bytes += len(data)
                count += 1
                self.advance(len(data))
        shard = Shard(file, tokens, count, count_bytes)
        # After the shard: a record is there only where the shard is.
        record = {"digest": self.digest, "first": first, "shard": asdict(shard)}
        _write_json(self._record_path(file), record)
        return shard

    def _record_path(self, file: str) -> Path:
        return (self.folder / file).with_suffix(".json")


def _is_whole(folder: Path, shard: Shard, dtype: str) -> bool:
    try:
        return (folder / shard.file).stat().st_size == shard.tokens * np.dtype(dtype).itemsize
    except OSError:
        return False


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when it is whole and durable, or never.

    Of two processes that make the same one, the later replaces it by the same bytes.
    """
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_temporaries(folder: Path) -> None:
    """Remove what killed processes left; only for who holds the lock, as nobody else writes."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Let one process at a time prepare; the ranks of a node would all do the same work.

    Yields whether the file system has locks. Without them all prepare, which is as right.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        is_alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process prepares the same text; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            is_alone = False
        yield is_alone
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _new_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    """Return a file's object; an empty one where it is not there or none of ours."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_index(prepared: Prepared, digest: str, end: int) -> None:
    content = {"version": _VERSION, "digest": digest, "end": end, **asdict(prepared)}
    del content["folder"]
    _write_json(prepared.folder / _INDEX, content)


def _read_index(folder: Path, digest: str) -> Prepared | None:
    """Return what was prepared; None where it was not finished, or a shard is gone."""
    content = _read_json(folder / _INDEX)
    if content.get("version") != _VERSION or content.get("digest") != digest:
        return None
    parts = {
        name: Part(**{**part, "shards": [Shard(**shard) for shard in part["shards"]]})
        for name, part in content["parts"].items()
    }
    dtype = content["dtype"]
    shards = [shard for part in parts.values() for shard in part.shards]
    if not all(_is_whole(folder, shard, dtype) for shard in shards):
        return None
    return Prepared(folder, content["tokenizer"], content["vocabulary"], dtype, parts)


def _refuse_others(folder: Path, digest: str) -> None:
    """Refuse a folder with shards of other files or settings: another run may be using them."""
    found = _read_json(folder / _INDEX)
    if found and found.get("digest") != digest:
        raise DataError(
            f"{folder} has shards of other files, or of other versions of them, or of another "
            "data.tokenizer, data.eval_share or data.shard_tokens; give another data.dir, or "
            "remove the folder if no run needs it"
        )


# --- documents ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Document:
    name: str
    """Path below the pattern's folder: the same wherever that folder is."""
    path: str
    size_bytes: int
    stamp: str
    """Changes when the file does: its mtime in ns, an object's ETag."""


@dataclass(frozen=True)
class _Corpus:
    documents: list[_Document]
    """Sorted by name."""
    read: Callable[[_Document], bytes]


def _sorted(documents: Sequence[_Document]) -> list[_Document]:
    return sorted(documents, key=lambda document: document.name)


@contextmanager
def _data_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.split(".")[0] in _FOREIGN):
            raise
        text = getattr(error, "strerror", None) or error
        raise DataError(
            f"{what} cannot be read: {text}; check that it is there, and the rights on it"
        ) from None


def _standard_library() -> _Corpus:
    """Return the sources of the running interpreter's own library, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in root.rglob("*.py")
        if not _NOT_IN_LIBRARY & set(path.relative_to(root).parts[:-1])
    ]
    if not paths:
        raise DataError(f"{root} has no Python sources to train on; give data.files")
    return _local_corpus(root, paths)


def _local_files(pattern: str) -> _Corpus:
    pattern = os.path.expanduser(pattern.removeprefix("file://"))
    if os.path.isdir(pattern):
        raise DataError(
            f"data.files={pattern} is a folder; give a pattern of files: '{pattern}/**/*.txt'"
        )
    paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
    return _local_corpus(Path(_fixed_folder(pattern)), [p for p in paths if p.is_file()])


def _local_corpus(root: Path, paths: Sequence[Path]) -> _Corpus:
    documents = []
    for path in paths:
        with _data_errors(str(path)):
            found = path.stat()
        name = path.relative_to(root).as_posix()
        documents.append(_Document(name, str(path), found.st_size, str(found.st_mtime_ns)))
    return _Corpus(_sorted(documents), _read_local)


def _read_local(document: _Document) -> bytes:
    with _data_errors(document.path):
        return Path(document.path).read_bytes()


def _remote_files(url: str) -> _Corpus:
    import fsspec

    try:
        system, pattern = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        extra = "; pip install 'perdure[s3]'" if url.startswith("s3") else ""
        raise ConfigError(f"data.files={url}: {error}{extra}") from None
    except ValueError as error:
        raise ConfigError(f"data.files={url}: {error}") from None
    with _data_errors(f"data.files={url}"):
        found = system.glob(pattern, detail=True)
    root = _fixed_folder(pattern)
    documents = []
    for path, about in found.items():
        if about["type"] == "file":
            name = PurePosixPath(path).relative_to(root).as_posix()
            stamp = next((str(about[key]) for key in _STAMPS if about.get(key)), "")
            documents.append(_Document(name, path, int(about["size"]), stamp))
    return _Corpus(_sorted(documents), partial(_read_remote, system))


def _read_remote(system: Any, document: _Document) -> bytes:
    with _data_errors(document.path):
        data: bytes = system.cat_file(document.path)
    return data


def _fixed_folder(pattern: str) -> str:
    """Return the deepest folder that is in a pattern's every match."""
    folder, _, _ = pattern.rpartition("/")
    while glob.has_magic(folder):
        folder, _, _ = folder.rpartition("/")
    return folder or ("/" if pattern.startswith("/") else "")


# --- tokenizers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokenizer:
    vocabulary: int
    end: int
    """Token after each document."""
    encode: Callable[[bytes], npt.NDArray[Any]]
    decode: Callable[[Sequence[int]], str]


def _encode_bytes(data: bytes) -> npt.NDArray[Any]:
    return np.frombuffer(data, dtype=np.uint8)


def _decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


_BYTES = _Tokenizer(vocabulary=257, end=256, encode=_encode_bytes, decode=_decode_bytes)


def _identity(name: str) -> str:
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


def _load_tokenizer(name: str) -> _Tokenizer:
    if name == "bytes":
        return _BYTES
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


def _load_json(name: str) -> _Tokenizer:
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

    return _Tokenizer(max(size, end + 1), end, encode, decode)


def _load_tiktoken(name: str) -> _Tokenizer:
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

    return _Tokenizer(inner.n_vocab, inner.eot_token, encode, decode)
