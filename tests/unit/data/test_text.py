"""Text against the bytes of its files; shards that survive kills, races and changed sources."""

import errno
import fcntl
import json
import os
import pickle
import random
import signal
import sys
import sysconfig
import tempfile
import time
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.cluster.world import World
from trainer.data import corpus
from trainer.data.batches import fetch
from trainer.data.source import EvalStream, TrainStream
from trainer.data.text import Text, Windows
from trainer.data.token_shards import Part, Shard
from trainer.errors import ConfigError, DataError

END = 256
DOCUMENTS = {
    f"{'deep/' * (number % 3)}{number:02d}.txt": random.Random(number).randbytes(number * 7 % 90)
    for number in range(24)
}


def write(folder, documents=DOCUMENTS):
    for name, data in documents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return f"{folder}/**/*.txt"


@pytest.fixture
def files(tmp_path):
    """The pattern of a small corpus: 24 files of any bytes, one of them empty."""
    return write(tmp_path / "corpus")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(files, folder=None, **arguments):
    """Return a Text that has several shards and windows in each part."""
    settings = {"context": 5, "eval_share": 0.4, "shard_tokens": 100, **arguments}
    return Text(files, dir=None if folder is None else str(folder), **settings)


def tokens_of(prepared, part):
    shards = prepared.parts[part].shards
    read = [np.fromfile(prepared.folder / s.file, prepared.dtype) for s in shards]
    assert [len(tokens) for tokens in read] == [shard.tokens for shard in shards]
    return np.concatenate(read).tolist()


def documents_of(prepared, part):
    """Return the documents that the tokens of a part spell."""
    result = [[]]
    for token in tokens_of(prepared, part):
        result[-1].append(token) if token != END else result.append([])
    assert result.pop() == []
    return [bytes(document) for document in result]


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# --- what is prepared --------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 25])
def test_tokens_are_document_bytes_with_end_tokens(files, shard_tokens):
    prepared = small(files, shard_tokens=shard_tokens).prepare()
    result = {part: documents_of(prepared, part) for part in ("train", "eval")}
    assert sorted(result["train"] + result["eval"]) == sorted(DOCUMENTS.values())
    for part, documents in result.items():
        names = [name for name in sorted(DOCUMENTS) if DOCUMENTS[name] in documents]
        assert documents == [DOCUMENTS[name] for name in names]
        about = prepared.parts[part]
        assert about.documents == len(documents)
        assert about.bytes == sum(map(len, documents))
        assert about.tokens == about.bytes + about.documents
        assert len(about.shards) == {1: len(documents), 1 << 25: 1}.get(
            shard_tokens, len(about.shards)
        )


def test_index_describes_the_shards(files):
    source = small(files)
    prepared = source.prepare()
    index = json.loads((prepared.folder / "index.json").read_bytes())
    assert (index["version"], index["tokenizer"], index["dtype"]) == (1, "bytes", "uint16")
    assert (index["vocabulary"], index["end"], source.vocabulary) == (257, 256, 257)
    assert [shard["file"] for shard in index["parts"]["train"]["shards"]][:2] == [
        "train-00000.bin", "train-00001.bin",
    ]  # fmt: skip
    part = prepared.parts["eval"]
    assert source.bytes_per_token == part.bytes / part.tokens
    assert prepared.folder.parent.name == "perdure"


def test_prepared_shards_are_reused(files, monkeypatch):
    prepared = small(files).prepare()
    monkeypatch.setattr(corpus, "_read_local", None)
    assert small(files).prepare() == prepared


def test_text_constructor_reads_nothing():
    Text("/nowhere/*.txt", tokenizer="/nowhere/tokenizer.json")


def test_prepare_reports_progress_in_bytes_and_lines(files):
    done, lines = [], []
    source = small(files)
    prepared = source.prepare(lines.append, done.append)
    total = sum(map(len, DOCUMENTS.values()))
    assert sum(done) == source.total_bytes == total
    assert len(lines) == sum(len(part.shards) for part in prepared.parts.values())
    assert lines[0].startswith("train-00000.bin: ")


def test_standard_library_is_usable_text():
    library = sysconfig.get_path("stdlib")
    source = Text(f"{library}/json/*.py", context=64, eval_share=0.4)
    prepared = source.prepare()
    result = documents_of(prepared, "train") + documents_of(prepared, "eval")
    assert sorted(result) == sorted(p.read_bytes() for p in Path(library, "json").glob("*.py"))
    inputs, targets = source.train[0]
    assert inputs[1:].tolist() == targets[:-1].tolist()


def test_standard_library_excludes_tests_and_packages():
    library = Path(sysconfig.get_path("stdlib"))
    left_out = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
    total = 0
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in left_out]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        total += sum(path.stat().st_size for path in paths)
    assert Text().total_bytes == total > 1_000_000


# --- the split ---------------------------------------------------------------------------------


def test_split_is_independent_of_file_order(files, tmp_path, monkeypatch):
    first = small(files).prepare()
    result = corpus.glob.glob(files, recursive=True)
    random.Random(0).shuffle(result)
    monkeypatch.setattr(corpus.glob, "glob", lambda pattern, recursive: result)
    second = small(files, tmp_path / "other").prepare()
    assert contents(first.folder) == contents(second.folder)


def test_document_stays_in_its_split_when_files_are_added_or_moved(files, tmp_path):
    before = documents_of(small(files).prepare(), "eval")
    more = {f"new{number}.txt": b"new%d" % number for number in range(20)}
    moved = write(tmp_path / "elsewhere" / "moved", {**DOCUMENTS, **more})
    after = documents_of(small(moved).prepare(), "eval")
    assert [document for document in after if not document.startswith(b"new")] == before
    assert len(after) > len(before)


@pytest.mark.parametrize(("fraction", "word"), [(1e-9, "evaluate on"), (1 - 1e-9, "train on")])
def test_empty_split_is_rejected_with_the_nearest_valid_share(files, fraction, word):
    with pytest.raises(DataError, match=f"leaves nothing to {word}: .* 24 documents") as error:
        small(files, eval_share=fraction).prepare()
    nearest = float(str(error.value).partition("nearest: ")[2].partition(")")[0])
    prepared = small(files, eval_share=nearest).prepare()
    assert all(part.documents for part in prepared.parts.values())


# --- windows -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    context=st.integers(1, 40),
    dtype=st.sampled_from(["uint16", "uint32"]),
    data=st.data(),
)
def test_windows_are_token_slices_also_across_shards(lengths, context, dtype, data):
    with tempfile.TemporaryDirectory() as folder:
        limit = np.iinfo(dtype).max
        everything = np.random.default_rng(0).integers(0, limit, sum(lengths), endpoint=True)
        shards, start = [], 0
        for number, length in enumerate(lengths):
            shards.append(Shard(f"{number}.bin", length, 1, length))
            piece = everything[start : start + length]
            piece.astype(dtype).tofile(Path(folder, f"{number}.bin"))
            start += length
        windows = Windows(Path(folder), Part(shards, 1, start, start), dtype, context)
        slices = [
            everything[begin : begin + context + 1].tolist()
            for begin in range(0, start - context, context)
        ]
        assert len(windows) == len(slices)
        if not slices:
            return
        numbers = data.draw(st.lists(st.integers(0, len(slices) - 1), min_size=1, max_size=12))
        inputs, targets = windows.__getitems__(numbers)
        assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
        assert inputs.tolist() == [slices[index][:-1] for index in numbers]
        assert targets.tolist() == [slices[index][1:] for index in numbers]
        one = windows[numbers[0]]
        assert [t.tolist() for t in one] == [slices[numbers[0]][:-1], slices[numbers[0]][1:]]


def test_window_out_of_range_is_an_index_error(files):
    windows = small(files).train
    for index in (-1, len(windows)):
        with pytest.raises(IndexError, match="from 0 on"):
            windows[index]
    assert len(list(windows)) == len(windows)


def test_windows_are_pickled_without_mapped_files(files):
    windows = small(files).train
    expected = fetch(windows, torch.arange(len(windows)))
    data = pickle.dumps(windows)
    assert len(data) < 4000
    again = fetch(pickle.loads(data), torch.arange(len(windows)))
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_train_stream_reads_windows_in_batches(files):
    source = small(files)
    world = World()
    stream = TrainStream(source.train, world, seed=0, global_batch_size=4)
    (batch,), _ = next(stream.batches({"epoch": 0, "batch": 0}))
    assert [tuple(tensor.shape) for tensor in batch] == [(4, 5), (4, 5)]
    seen = torch.cat([b[0] for b in EvalStream(source.eval, world, batch_size=3).batches()])
    everything = tokens_of(source.prepare(), "eval")
    assert seen.flatten().tolist() == everything[: len(seen) * 5]


# --- kills and races ---------------------------------------------------------------------------


def forked(function):
    """Run a function in a separate process; return its pid. Its exit code is 0 or 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child needs no other threads
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    finally:
        os._exit(code)


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(is_so, pid):
    """Wait for an observable fact, while the process lives."""
    end = time.monotonic() + 60
    while not is_so():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the process has ended"
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def reference(files, tmp_path):
    """The contents of a folder that was prepared without a break."""
    small(files, tmp_path / "whole").prepare()
    return contents(tmp_path / "whole")


def test_finished_shards_survive_a_kill(files, reference, tmp_path):
    folder = tmp_path / "shards"
    finished = [folder / f"train-0000{number}.bin" for number in range(2)]
    read = corpus._read_local

    def stuck():
        def reading(document):
            if finished[1].with_suffix(".json").exists():
                signal.pause()
            return read(document)

        corpus._read_local = reading
        small(files, folder).prepare()

    pid = forked(stuck)
    third = "*-train-00002.bin"  # in the middle of it
    wait_for(lambda: list(folder.glob(f".tmp-{third}")), pid)
    os.kill(pid, signal.SIGKILL)
    assert status_of(pid) == -signal.SIGKILL
    assert not (folder / "index.json").exists()
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in finished]
    lines = []
    small(files, folder).prepare(lines.append)
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in finished] == before
    assert [line.endswith("already complete") for line in lines[:3]] == [True, True, False]
    assert contents(folder) == reference  # and no temporary file is left


def test_prepare_killed_at_every_fsync_completes(files, tmp_path):
    folder, fsync = tmp_path / "shards", os.fsync

    def prepares(at):
        calls = iter(range(at))

        def counted(descriptor):
            fsync(descriptor)
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = counted
        small(files, folder, shard_tokens=300).prepare()

    kills = 0  # of the four of a shard and its record, the last is the one that brings it on
    while status_of(forked(partial(prepares, kills % 4))) == -signal.SIGKILL:
        kills += 1
        assert kills < 100
    assert kills >= 16
    small(files, tmp_path / "whole", shard_tokens=300).prepare()
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.parametrize("has_locks", [True, False])
def test_prepare_in_two_processes_gives_the_same_shards(files, reference, tmp_path, has_locks):
    folder, read = tmp_path / "shards", corpus._read_local
    (there, arrived), (go, start) = os.pipe(), os.pipe()

    def no_lock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks here")

    def prepares():
        has_met = []

        def meet(_):
            if not has_met:
                has_met.append(True)
                os.write(arrived, b".")
                os.read(go, 1)

        def reading(document):
            meet(document)
            return read(document)

        corpus._read_local = reading
        if not has_locks:
            fcntl.flock = no_lock
        source = small(files, folder)
        prepared = source.prepare(meet)  # with locks, the second one tells that it waits
        assert len(source.train) == (prepared.parts["train"].tokens - 1) // 5

    pids = [forked(prepares) for _ in range(2)]
    for _ in pids:
        assert os.read(there, 1) == b"."  # both are in the middle
    os.write(start, b"..")
    assert [status_of(pid) for pid in pids] == [0, 0]
    for descriptor in (there, arrived, go, start):
        os.close(descriptor)
    assert contents(folder) == reference


# --- what changes and what is damaged ----------------------------------------------------------


def test_changed_inputs_get_another_folder(files, tmp_path):
    folders = [small(files).prepare().folder, small(files, eval_share=0.5).prepare().folder]
    path = tmp_path / "corpus" / "03.txt"
    data = path.read_bytes()
    path.write_bytes(data[::-1])
    os.utime(path, ns=(0, 0))
    folders.append(small(files).prepare().folder)
    path.write_bytes(data + b"more")
    folders.append(small(files).prepare().folder)
    (tmp_path / "corpus" / "one_more.txt").write_bytes(b"x")
    folders.append(small(files).prepare().folder)
    assert len(set(folders)) == 5
    assert small(files).prepare().folder == folders[-1]


def test_folder_with_other_shards_is_rejected(files, tmp_path):
    folder = tmp_path / "shards"
    small(files, folder).prepare()
    before = contents(folder)
    (tmp_path / "corpus" / "03.txt").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"shards of other files.*use another data.dir"):
        small(files, folder).prepare()
    assert contents(folder) == before


@pytest.mark.parametrize("damaged", [
    ["train-00001.bin"], ["index.json"], ["train-00001.json", "index.json"],
    ["train-00001.bin", "train-00001.json"],
])  # fmt: skip
def test_missing_or_truncated_shard_is_recreated_alone(files, reference, tmp_path, damaged):
    folder = tmp_path / "shards"
    small(files, folder).prepare()
    inode = (folder / "train-00000.bin").stat().st_ino
    for name in damaged:
        (folder / name).write_bytes((folder / name).read_bytes()[:-2])
    small(files, folder).prepare()
    assert contents(folder) == reference
    for name in damaged:
        (folder / name).unlink()
    small(files, folder).prepare()
    assert contents(folder) == reference
    assert (folder / "train-00000.bin").stat().st_ino == inode


def test_changed_shard_is_a_data_error(files, tmp_path):
    source = small(files, tmp_path / "shards")
    windows = source.train
    (tmp_path / "shards" / "train-00000.bin").write_bytes(b"12")
    with pytest.raises(DataError, match=r"train-00000.bin has 1 tokens, but index.json lists"):
        windows[0]
    (tmp_path / "shards" / "train-00000.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        windows[0]


def test_growing_file_is_a_data_error(files, monkeypatch):
    monkeypatch.setattr(corpus, "_read_local", lambda document: b"longer" * 50)
    with pytest.raises(DataError, match=r"300 bytes but had .* when the files were listed"):
        small(files).prepare()


def test_full_disk_is_a_data_error_with_the_path(files, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"shards cannot be written: No space left.*data.dir"):
        small(files, tmp_path / "shards").prepare()
    assert contents(tmp_path / "shards") == {}


# --- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    ({"context": 0}, r"data.context=0 is too small"),
    ({"shard_tokens": 0}, r"data.shard_tokens=0 is too small"),
    ({"eval_share": 0.0}, r"data.eval_share=0.0 must be above 0"),
    ({"eval_share": 1}, r"data.eval_share=1 must be"),
    ({"dir": "s3://bucket/x"}, r"data.dir=s3://bucket/x: .* local folder"),
    ({"tokenizer": ""}, r"data.tokenizer is empty"),
    ({"files": ""}, r"data.files is empty"),
])  # fmt: skip
def test_text_rejects_arguments_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Text(**arguments)


def test_file_errors_name_the_setting(tmp_path, files):
    with pytest.raises(DataError, match=r"data.files=.*\*.md: no such files"):
        small(f"{tmp_path}/*.md").prepare()
    with pytest.raises(DataError, match=r"is a folder; use a pattern"):
        small(str(tmp_path)).prepare()
    with pytest.raises(DataError, match=r"1 document; .*divide the file into several"):
        small(f"{tmp_path}/corpus/03.txt").prepare()
    with pytest.raises(ConfigError, match=r"nosuch://x/\*: Protocol not known"):
        small("nosuch://x/*").prepare()
    with pytest.raises(ConfigError, match=r"absent.json cannot be read: No such file"):
        small(files, tokenizer="absent.json").prepare()
    with pytest.raises(DataError, match=r"tokens, but a window of data.context=5000 needs 5,001"):
        _ = small(files, context=5000).train


def test_vocabulary_larger_than_the_model_is_rejected(files):
    with pytest.raises(ConfigError, match=r"257 tokens, data.classes is 256; set sample.classes"):
        small(files, classes=256).prepare()
    small(files, classes=300).prepare()


# --- other places and tokenizers ---------------------------------------------------------------


def test_fsspec_files_give_the_same_shards(files, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in DOCUMENTS.items():
        memory.pipe_file(f"/books/{name}", data)
    try:
        there = small("memory://books/**/*.txt", tmp_path / "there").prepare()
        here = small(files).prepare()
        assert there.parts == here.parts
        assert tokens_of(there, "train") == tokens_of(here, "train")
        memory.pipe_file("/books/03.txt", b"changed")
        with pytest.raises(DataError, match="other files"):
            small("memory://books/**/*.txt", tmp_path / "there").prepare()
    finally:
        memory.rm("/books", recursive=True)


class Words:
    """A tokenizer.json's tokenizer with as much of its interface as is used."""

    def __init__(self, vocabulary):
        self.vocabulary, self.is_plain = vocabulary, []

    def no_truncation(self):
        self.is_plain.append("truncation")

    def no_padding(self):
        self.is_plain.append("padding")

    def get_vocab(self, with_added_tokens):
        return self.vocabulary

    def encode(self, words, add_special_tokens):
        assert self.is_plain == ["truncation", "padding"]
        assert not add_special_tokens
        ids = [self.vocabulary[word] for word in words.split()]
        return types.SimpleNamespace(ids=ids)


@pytest.mark.parametrize(("vocabulary", "end", "size", "dtype"), [
    ({"a": 0, "b": 1, "\ufffd": 2}, 3, 4, "uint16"),
    ({"a": 0, "b": 7, "\ufffd": 2, "</s>": 5}, 5, 8, "uint16"),
    ({"a": 0, "b": 70000, "\ufffd": 2, "<|endoftext|>": 1}, 1, 70001, "uint32"),
])  # fmt: skip
def test_tokenizer_json_uses_or_gets_an_end_token(
    tmp_path, monkeypatch, vocabulary, end, size, dtype
):
    module = types.ModuleType("tokenizers")
    module.Tokenizer = types.SimpleNamespace(from_file=lambda path: Words(vocabulary))
    monkeypatch.setitem(sys.modules, "tokenizers", module)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    documents = {f"{number}.txt": b"a b b \xff" for number in range(12)}  # not UTF-8 at the end
    source = small(write(tmp_path / "words", documents), tokenizer=str(path))
    assert source.vocabulary == size
    prepared = source.prepare()
    assert (prepared.vocabulary, prepared.dtype) == (size, dtype)
    one = [vocabulary["a"], vocabulary["b"], vocabulary["b"], 2, end]
    assert tokens_of(prepared, "train") == one * prepared.parts["train"].documents
    assert source.bytes_per_token == len(b"a b b \xff") / 5
    assert source.train[0][1].tolist() == [*one[1:], one[0]]
    path.write_text('{"other": 1}')
    assert small(f"{tmp_path}/words/*.txt", tokenizer=str(path)).prepare() != prepared


def test_decode_restores_the_text(files, tmp_path):
    windows = small(files).train
    tokens = [token for index in range(len(windows)) for token in windows[index][0].tolist()]
    text = b"".join(DOCUMENTS.values()).decode(errors="replace")
    assert windows.decode([*b"caf\xc3\xa9", 256, 999, *b"\xff"]) == "café\ufffd"
    assert all(line in text for line in windows.decode(tokens).splitlines()[1:3])
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = library.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    documents = {f"{number}.txt": b"a b b c" for number in range(12)}
    source = small(
        write(tmp_path / "some", documents), tokenizer=str(tmp_path / "words.json"), context=4
    )
    assert source.train.decode([0, 1, 2, 3, 9]) == "a b ?"  # 3 ends a document, 9 is not a token


@pytest.mark.parametrize("name", ["tokenizers", "tiktoken"])
def test_missing_tokenizer_package_is_named(files, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    tokenizer = {"tokenizers": str(path), "tiktoken": "tiktoken:gpt2"}[name]
    with pytest.raises(ConfigError, match=rf"needs the package {name}.*perdure\[text\]"):
        small(files, tokenizer=tokenizer).prepare()


def test_tiktoken_reads_local_files_only(files, monkeypatch):
    module, load = types.ModuleType("tiktoken"), types.ModuleType("tiktoken.load")
    encoding = types.SimpleNamespace(
        n_vocab=300, eot_token=299, encode_ordinary=lambda words: [len(words)]
    )
    load.read_file = download = object()

    def get_encoding(name):
        if name == "absent":
            load.read_file("https://example.org/absent")
        return encoding

    module.get_encoding, module.load = get_encoding, load
    module.list_encoding_names = lambda: ["absent", "here"]
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    monkeypatch.setitem(sys.modules, "tiktoken.load", load)
    with pytest.raises(ConfigError, match=r"example.org/absent is not in tiktoken's cache"):
        small(files, tokenizer="tiktoken:absent").prepare()
    assert load.read_file is download
    with pytest.raises(ConfigError, match=r"no such encoding \(valid: absent, here\)"):
        small(files, tokenizer="tiktoken:other").prepare()
    encoding.decode_single_token_bytes = {7: b"so ", 8: b"\xc3", 9: b"\xa9"}.__getitem__
    assert small(files, tokenizer="tiktoken:here").eval.decode([7, 55, 8, 9]) == "so é"
    prepared = small(files, tokenizer="tiktoken:here").prepare()
    assert tokens_of(prepared, "eval")[1::2] == [299] * prepared.parts["eval"].documents
