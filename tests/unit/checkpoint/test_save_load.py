"""Save, latest, load on a real directory: equal to the bit, or an error that names the file."""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.faulty_stores import FaultyStore
from support.shard_files import write_tensors
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import lineage, manifest, shard, state_tree
from trainer.checkpoint.plan import DTYPE_NAMES
from trainer.checkpoint.reader import DamagedError, Reader
from trainer.checkpoint.state_tree import Content
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.errors import CheckpointError, StoreError
from trainer.storage import LocalStore, Store

MIB = 1 << 20


def writer_on(store: Store) -> Writer:
    return Writer(store, World(), lineage.begin(store, {}))


def save(writer: Writer, tensors: dict[str, Tensor], step: int = 1, **more: Any) -> Any:
    return checkpoint.save(writer, Content(tensors=tensors, **more), step=step)


def raw_bytes(tensor: Tensor) -> bytes:
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return bytes(plain.copy_(tensor.detach().reshape(-1)).view(torch.uint8).numpy())


def blank(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and dtype that holds something else."""
    return torch.ones(tensor.shape).to(tensor.dtype)


def load_all(store: Store, tensors: dict[str, Tensor], **how: Any) -> dict[str, Tensor]:
    found = checkpoint.latest(store)
    assert found is not None
    targets = {name: blank(tensor) for name, tensor in tensors.items()}
    checkpoint.load(store, found, targets, **how)
    return targets


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw_bytes(found[name]) == raw_bytes(tensor), name


def keys_on(store: Store, folder: str = "checkpoints") -> set[str]:
    return set(store.list(folder))


# --- equal to the bit --------------------------------------------------------------------------

SHAPE_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "every other": lambda t: t[..., ::2] if t.dim() else t,
    "inner part": lambda t: t[1:] if t.dim() else t,
    "expanded": lambda t: t.expand(3, *t.shape),
    "a view of more": lambda t: torch.stack([t, t])[1],
}


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(list(DTYPE_NAMES)))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count = math.prod(shape)
    seed = draw(st.integers(0, 255))
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        made = torch.randint(0, 2, shape, generator=generator).bool()
    else:
        size = count * dtype.itemsize
        noise = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        made = noise.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return SHAPE_CHANGES[draw(st.sampled_from(sorted(SHAPE_CHANGES)))](made)


NAMES = st.text(max_size=8).filter(lambda n: n != "__metadata__" and not re.search("@[0-9,]+$", n))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, tensors(), max_size=8))
@example({})
@example({name: torch.ones((), dtype=dtype) for dtype, name in DTYPE_NAMES.items()})
@example({name: torch.ones((0, 2), dtype=dtype) for dtype, name in DTYPE_NAMES.items()})
@example({"../x": torch.ones(1), "/": torch.ones(2), "": torch.ones(3), "a@0": torch.ones(1)})
@example({"conj": torch.tensor([1 + 2j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag})
@example({"nan": torch.tensor([0x7FC00001, -1, 1]).int().view(torch.float32)})
def test_what_is_loaded_is_what_was_saved(tmp_path_factory, values):
    store = LocalStore(tmp_path_factory.mktemp("run"))
    expected = {name: value.clone() for name, value in values.items()}
    made = save(writer_on(store), values)
    assert checkpoint.latest(store) == made
    assert_equal(load_all(store, values), expected)
    assert_equal({name: Reader(store, f"checkpoints/{made.folder}", made).fetch(name)
                  for name in values}, expected)  # fmt: skip
    checkpoint.verify(store, made)


def test_a_name_that_a_part_of_another_tensor_may_get_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Rename one of them"):
        save(writer_on(LocalStore(tmp_path)), {"w": torch.ones(4), "w@0": torch.ones(3)})


def test_tensors_of_many_blocks_come_back(tmp_path):
    store = LocalStore(tmp_path)
    sizes = {"one": MIB, "more": MIB + 1, "less": MIB - 1, "many": 5 * MIB + 12345}
    values = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in sizes.items()
    }
    values["wide"] = torch.randn(300, 1001, dtype=torch.float64)
    save(writer_on(store), values)
    assert_equal(load_all(store, values), values)


def test_a_target_that_is_not_contiguous_is_filled_in_place_and_nothing_beside_it(tmp_path):
    store = LocalStore(tmp_path)
    values = {
        "a": torch.arange(12.0).reshape(3, 4),
        "b": torch.arange(3) * (1 + 1j),
        "c": torch.tensor([7.0]),
    }
    save(writer_on(store), values)
    found = checkpoint.latest(store)
    whole = torch.full((4, 8), -1.0)
    pairs = torch.full((3, 2), -1.0).to(torch.complex64)
    single = torch.full((4,), -1.0)
    checkpoint.load(
        store, found, {"a": whole.t()[1:7:2, :], "b": pairs[:, 1], "c": single[1::3][:1]}
    )
    expected = torch.full((4, 8), -1.0)
    expected.t()[1:7:2, :] = values["a"]
    assert torch.equal(whole, expected)
    assert single.tolist() == [-1, 7, -1, -1]
    assert torch.equal(pairs[:, 1], values["b"])
    assert torch.equal(pairs[:, 0], torch.full((3,), -1.0).to(torch.complex64))


def test_parameters_that_need_gradients_are_filled_without_recording_anything(tmp_path):
    store = LocalStore(tmp_path)
    model = nn.Linear(3, 2)
    save(writer_on(store), state_tree.model_targets(model))
    other = nn.Linear(3, 2)
    checkpoint.load(store, checkpoint.latest(store), state_tree.model_targets(other))
    assert torch.equal(other.weight, model.weight)
    assert other.weight.requires_grad
    assert other.weight.grad_fn is None


def test_numbers_objects_and_config_come_back(tmp_path):
    store = LocalStore(tmp_path)
    objects = {"run": {"cursor": {"epoch": 1}, "milestones": {3: 1}}, "x": (1, float("inf"))}
    made = checkpoint.save(
        writer_on(store),
        Content(objects=objects),
        step=12,
        epoch=3,
        samples=4567,
        config={"optimizer": {"lr": 0.1}},
    )
    found = checkpoint.latest(store)
    assert found == made
    assert (found.step, found.epoch, found.samples, found.attempt) == (12, 3, 4567, 1)
    assert (found.objects, found.config) == (objects, {"optimizer": {"lr": 0.1}})


def test_saves_follow_each_other_with_one_buffer_and_each_stays_what_it_was(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    history = {}
    for step, size in enumerate((3000, 10, 2000, 2000, 1), start=1):
        history[step] = {"w": torch.randn(size), "n": torch.tensor(step)}
        save(writer, history[step], step)
    assert [commit.step for commit in checkpoint.steps(store)] == [1, 2, 3, 4, 5]
    for commit in checkpoint.steps(store):
        made = lineage.read_manifest(store, commit)
        targets = {name: blank(value) for name, value in history[commit.step].items()}
        checkpoint.load(store, made, targets)
        assert_equal(targets, history[commit.step])


def test_a_store_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoint.latest(LocalStore(tmp_path / "absent")) is None
    assert checkpoint.steps(LocalStore(tmp_path / "absent")) == []


def test_a_deleted_checkpoint_is_gone_and_the_one_before_is_the_latest(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    for step in (1, 2):
        save(writer, {"w": torch.ones(step)}, step)
    checkpoint.delete(store, checkpoint.steps(store)[-1])
    assert checkpoint.latest(store).step == 1
    assert all("step-00000001." in key for key in keys_on(store))


# --- tied weights, buffers and optimizers ------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_written_once_and_found_under_both_names(tmp_path):
    store = LocalStore(tmp_path)
    model, content = Tied(), Content()
    state_tree.add_model(content, model, with_buffers=True)
    made = checkpoint.save(writer_on(store), content, step=1)
    assert made.tensors["model.head.weight"].alias == "model.embedding.weight"
    (name,) = made.files
    folder = f"checkpoints/{made.folder}"
    stored = Path(store.url, folder, name).read_bytes()
    assert stored.count(raw_bytes(model.embedding.weight)) == 1
    expected = {f"model.{key}": value for key, value in model.state_dict().items()}
    assert_equal({key: Reader(store, folder, made).fetch(key) for key in expected}, expected)

    other = Tied()
    checkpoint.load(store, made, state_tree.model_targets(other))
    assert other.head.weight is other.embedding.weight
    assert_equal({f"model.{key}": value for key, value in other.state_dict().items()}, expected)


def test_buffers_are_left_out_where_another_rank_brings_them():
    content = Content()
    state_tree.add_model(content, Tied(), with_buffers=False)
    assert not [name for name in content.tensors if "running" in name or "tracked" in name]
    assert "model.inner.1.weight" in content.tensors


class Remembering(nn.Linear):
    """A module with a state of its own beside its parameters."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.memory: Any = None

    def get_extra_state(self) -> Any:
        return self.memory

    def set_extra_state(self, state: Any) -> None:
        self.memory = state


def test_extra_state_with_tensors_inside_comes_back(tmp_path):
    store = LocalStore(tmp_path)
    model, content = nn.Sequential(Remembering()), Content()
    model[0].memory = {"scale": [torch.tensor(2.5), (1, "a")], "count": {3: 4}}
    state_tree.add_model(content, model, with_buffers=True)
    made = checkpoint.save(writer_on(store), content, step=1)
    other = nn.Sequential(Remembering())
    reader = Reader(store, f"checkpoints/{made.folder}", made)
    reader.read(state_tree.model_targets(other))
    state_tree.load_model(other, checkpoint.latest(store).objects, reader.fetch)
    assert other[0].memory == model[0].memory
    assert torch.equal(other[0].weight, model[0].weight)


def fetch_optimizer(store: Store, made: Any, model: nn.Module, optimizer: Any) -> None:
    reader = Reader(store, f"checkpoints/{made.folder}", made)
    stored = {
        name: (next(d for d, n in DTYPE_NAMES.items() if n == entry.dtype), entry.shape)
        for name, entry in made.tensors.items()
        if name.startswith("optimizer.")
    }
    slots = state_tree.optimizer_slots(model, [optimizer], stored)
    reader.read({name: slot.tensor for name, slot in slots.items()})
    state_tree.load_optimizers(model, [optimizer], made.objects["optimizer"], slots, reader.fetch)


def test_saving_an_optimizer_that_has_no_state_takes_no_step(tmp_path):
    store = LocalStore(tmp_path)
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = {name: raw_bytes(value) for name, value in model.named_parameters()}
    content = Content()
    state_tree.add_model(content, model, with_buffers=True)
    state_tree.add_optimizers(content, model, [optimizer])
    checkpoint.save(writer_on(store), content, step=1)
    assert {name: raw_bytes(value) for name, value in model.named_parameters()} == before
    assert len(optimizer.state) == 0
    assert model.weight.grad is not None

    other = nn.Linear(3, 2)
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    found = checkpoint.latest(store)
    checkpoint.load(store, found, state_tree.model_targets(other))
    fetch_optimizer(store, found, other, fresh)
    assert len(fresh.state) == 0
    assert fresh.param_groups[0]["lr"] == 0.5
    assert {name: raw_bytes(value) for name, value in other.named_parameters()} == before


def test_an_optimizer_with_state_in_two_groups_comes_back_to_the_bit(tmp_path):
    store = LocalStore(tmp_path)

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        groups = [
            {"params": list(model[0].parameters()), "lr": 0.1, "betas": (0.8, 0.9)},
            {"params": [model[1].weight], "weight_decay": 0.5},
        ]
        return model, torch.optim.AdamW(groups)

    model, optimizer = make()
    for _ in range(2):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    content = Content()
    state_tree.add_optimizers(content, model, [optimizer])
    checkpoint.save(writer_on(store), content, step=1)
    other, fresh = make()
    fetch_optimizer(store, checkpoint.latest(store), other, fresh)
    expected, found = optimizer.state_dict(), fresh.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert type(found["param_groups"][0]["betas"]) is tuple
    assert set(found["state"]) == set(expected["state"])
    for index, state in expected["state"].items():
        assert_equal(found["state"][index], state)


def test_an_optimizer_with_other_groups_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    model = nn.Linear(3, 2)
    content = Content()
    state_tree.add_optimizers(content, model, [torch.optim.SGD(model.parameters())])
    made = checkpoint.save(writer_on(store), content, step=1)
    other = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}])
    with pytest.raises(CheckpointError, match="2 groups"):
        fetch_optimizer(store, made, model, other)


def test_an_optimizer_of_a_parameter_outside_of_the_model_is_refused():
    stray = nn.Parameter(torch.ones(2, 7))
    with pytest.raises(CheckpointError, match=r"\(2, 7\)"):
        state_tree.add_optimizers(Content(), nn.Linear(3, 2), [torch.optim.SGD([stray])])


# --- what cannot be stored ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(2, dtype=torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.float8_e8m0fnu), "float8_e8m0fnu"),
    ],
    ids=["float8_e4m3fnuz", "sparse", "float8_e8m0fnu"],
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(tmp_path, tensor, what):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    with pytest.raises(CheckpointError, match="'odd'") as caught:
        save(writer, {"fine": torch.ones(1), "odd": tensor})
    assert what in str(caught.value)
    assert keys_on(store) == set()
    save(writer, {"fine": torch.ones(1)})
    assert checkpoint.latest(store).step == 1


def test_the_one_name_that_safetensors_keeps_for_itself_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="__metadata__"):
        save(writer_on(LocalStore(tmp_path)), {"__metadata__": torch.ones(1)})


def test_an_object_that_cannot_be_stored_is_refused_by_name_before_anything_is_written(tmp_path):
    store = LocalStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"objects\.scheduler\.rule is a builtins\.object"):
        save(writer_on(store), {"w": torch.ones(1)}, objects={"scheduler": {"rule": object()}})
    assert keys_on(store) == set()


# --- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "what"),
    [
        ("absent", torch.zeros(2, 3), "no tensor 'absent'"),
        ("w", torch.zeros(3, 2), r"F32 \[2, 3\], this model needs F32 \[3, 2\]"),
        ("w", torch.zeros(6), r"needs F32 \[6\]"),
        ("w", torch.zeros(2, 3, 1), r"needs F32 \[2, 3, 1\]"),
        ("w", torch.zeros(2, 3, dtype=torch.int32), r"needs I32 \[2, 3\]"),
        ("w", torch.zeros(2, 3, dtype=torch.float64), r"needs F64 \[2, 3\]"),
        ("w", torch.zeros(2, 3, dtype=torch.float8_e8m0fnu), "needs .*float8_e8m0fnu"),
        ("c", torch.zeros(2, 2, dtype=torch.float64), r"C128 \[2\]"),
    ],
)
def test_a_target_that_does_not_fit_is_refused_and_left_alone(tmp_path, name, target, what):
    store = LocalStore(tmp_path)
    made = save(
        writer_on(store), {"w": torch.ones(2, 3), "c": torch.ones(2, dtype=torch.complex128)}
    )
    with pytest.raises(CheckpointError, match=what) as caught:
        checkpoint.load(store, made, {name: target})
    assert not isinstance(caught.value, DamagedError)
    assert raw_bytes(target) == raw_bytes(torch.zeros_like(target))


def test_fetching_a_name_that_is_not_there_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    made = save(writer_on(store), {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        Reader(store, f"checkpoints/{made.folder}", made).fetch("absent")


# --- damage ------------------------------------------------------------------------------------

VALUES = {
    "a": torch.arange(5 * MIB // 8 + 3, dtype=torch.int64),  # six blocks, the last one small
    "b": torch.arange(700, dtype=torch.float32),
    "c": torch.arange(5, dtype=torch.uint8),
    "d": torch.arange(MIB + 1, dtype=torch.int32).to(torch.uint8),  # a last block of one byte
}


class Stored:
    """A run of two checkpoints of equal size, to be damaged and healed."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root)
        writer = writer_on(self.store)
        self.older = save(writer, {name: value + 1 for name, value in VALUES.items()}, 1)
        self.made = save(writer, VALUES, 2)
        (self.name,) = self.made.files
        self.path = root / "checkpoints" / self.made.folder / self.name
        self.older_path = root / "checkpoints" / self.older.folder / next(iter(self.older.files))

    def assert_whole(self) -> None:
        assert_equal(load_all(self.store, VALUES), VALUES)
        assert_equal(load_all(self.store, VALUES, peers=2), VALUES)
        checkpoint.verify(self.store, self.made)

    def assert_found(self, *about: str) -> None:
        """Both `load` and `verify` name the file and say what is wrong."""
        for find in (
            lambda: load_all(self.store, VALUES),
            lambda: load_all(self.store, VALUES, peers=2),
            self.verify,
        ):
            with pytest.raises(DamagedError) as caught:
                find()
            for text in (self.name, "step 2", *about):
                assert text in str(caught.value)

    def verify(self) -> None:
        checkpoint.verify(self.store, self.made)

    def flip(self, position: int, bit: int = 0) -> None:
        with open(self.path, "r+b") as file:
            file.seek(position)
            (value,) = file.read(1)
            file.seek(position)
            file.write(bytes([value ^ (1 << bit)]))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    made = Stored(tmp_path_factory.mktemp("damage"))
    made.assert_whole()
    yield made
    made.assert_whole()  # every test has healed what it broke


def positions(stored: Stored) -> dict[str, tuple[int, str]]:
    """Return one place of each kind, with what the error must say besides."""
    record = stored.made.files[stored.name]
    data = stored.path.read_bytes()
    chunks, _ = shard.parse_header(
        data[: record.header_bytes], total_bytes=record.bytes, where="test"
    )
    end_of_json = len(data[: record.header_bytes].rstrip(b" "))
    found = {
        f"header {what}": (place, "header")
        for what, place in {
            "length": 0, "length, high byte": 7, "first brace": 8, "middle": end_of_json // 2,
            "last brace": end_of_json - 1, "padding": end_of_json, "end": record.header_bytes - 1,
        }.items()
    }  # fmt: skip
    for chunk in chunks.values():
        for number, start in enumerate(range(chunk.start, chunk.stop, MIB)):
            stop = min(start + MIB, chunk.stop)
            about = f"'{chunk.key}': bytes {start - chunk.start:,} to {stop - chunk.start:,}"
            for what, place in {
                "first": start,
                "middle": (start + stop) // 2,
                "last": stop - 1,
            }.items():
                found[f"{chunk.key}, block {number}, {what} byte"] = (place, about)
    return found


def test_a_flipped_bit_in_every_block_and_every_part_of_the_header_is_found(stored):
    places = positions(stored)
    assert len(places) == 7 + 3 * (6 + 1 + 1 + 2)
    for bit, (place, about) in enumerate(places.values()):
        stored.flip(place, bit % 8)
        stored.assert_found(about)
        stored.flip(place, bit % 8)


@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(stored, fraction, bit):
    place = int(fraction * stored.path.stat().st_size)
    stored.flip(place, bit)
    stored.assert_found()
    stored.flip(place, bit)


@pytest.mark.parametrize("change", [-1, +1, -4096])
def test_a_file_of_another_length_is_found(stored, change):
    data = stored.path.read_bytes()
    stored.path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    stored.assert_found("bytes but its manifest records")
    stored.path.write_bytes(data)


def test_an_empty_file_is_found(stored):
    data = stored.path.read_bytes()
    stored.path.write_bytes(b"")
    stored.assert_found("0 bytes")
    stored.path.write_bytes(data)


def test_a_missing_file_is_found(stored):
    moved = stored.path.with_suffix(".away")
    stored.path.rename(moved)
    stored.assert_found("missing")
    moved.rename(stored.path)


def test_a_file_replaced_by_another_good_shard_of_equal_size_is_found(stored):
    kept = stored.path.with_suffix(".away")
    assert stored.path.stat().st_size == stored.older_path.stat().st_size
    stored.path.rename(kept)
    shutil.copy(stored.older_path, stored.path)
    stored.assert_found("header")
    kept.rename(stored.path)


def test_a_good_header_over_the_data_of_another_save_is_found(stored):
    data, other = stored.path.read_bytes(), stored.older_path.read_bytes()
    length = stored.made.files[stored.name].header_bytes
    stored.path.write_bytes(data[:length] + other[length:])
    stored.assert_found("checksum mismatch")
    stored.path.write_bytes(data)


def test_blocks_that_changed_places_are_found(stored):
    data = stored.path.read_bytes()
    start = positions(stored)["a, block 0, first byte"][0]
    one, two = data[start : start + MIB], data[start + MIB : start + 2 * MIB]
    stored.path.write_bytes(data[:start] + two + one + data[start + 2 * MIB :])
    stored.assert_found("'a': bytes 0 to")
    stored.path.write_bytes(data)


def test_a_manifest_that_lies_in_the_folder_of_another_step_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    made = save(writer_on(store), SMALL, 1)
    os.rename(tmp_path / "checkpoints" / made.folder, tmp_path / "checkpoints/step-00000002.0001")
    with pytest.raises(CheckpointError, match="manifest of step 1, attempt 1"):
        checkpoint.latest(store)


class LyingOnce(LocalStore):
    """A disk whose first answers are wrong, and whose second ones are right."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._seen: set[tuple[str, int]] = set()

    def read_into(self, key: str, start: int, buffer: memoryview, **how: Any) -> int:
        count = super().read_into(key, start, buffer, **how)
        if (key, start) not in self._seen:
            self._seen.add((key, start))
            buffer[-1] ^= 1
        return count


def test_bytes_are_judged_only_after_a_second_reading(stored):
    assert_equal(load_all(LyingOnce(stored.store.url), VALUES), VALUES)
    checkpoint.verify(LyingOnce(stored.store.url), stored.made)


# --- tensors that are cut over several files ---------------------------------------------------


def in_parts(store: Store) -> tuple[manifest.Manifest, dict[str, Tensor]]:
    """Commit a checkpoint as several ranks would: a grid and columns over three files."""
    values = {
        "grid": torch.arange(35.0).reshape(5, 7),
        "columns": torch.randn(4, 6, dtype=torch.complex128),
        "whole": torch.arange(9).to(torch.int16),
    }
    files = [
        {
            "grid@0,0": values["grid"][:2],
            "columns@0,0": values["columns"][:, :2],
            "whole": values["whole"],
        },
        {"grid@2,0": values["grid"][2:4], "columns@0,2": values["columns"][:3, 2:]},
        {"grid@4,0": values["grid"][4:], "columns@3,2": values["columns"][3:, 2:]},
    ]
    attempt = lineage.begin(store, {})
    folder, records = f"checkpoints/{manifest.folder_name(1, attempt.number)}", {}
    for rank, parts in enumerate(files):
        name = manifest.shard_name(rank=rank, world_size=3, token=attempt.token, save=1)
        _, records[name] = write_tensors(store, f"{folder}/{name}", parts)
    made = manifest.Manifest(
        step=1, epoch=0, samples=0, attempt=attempt.number, token=attempt.token, save=1,
        world_size=3, versions={}, files=records, objects={},
        tensors={
            "grid": manifest.TensorEntry(dtype="F32", shape=(5, 7), grid=(3, 1)),
            "columns": manifest.TensorEntry(dtype="C128", shape=(4, 6), columns={
                "file": [0, 1, 2],
                "offsets": [[0, 0], [0, 2], [3, 2]],
                "lengths": [[4, 2], [3, 4], [1, 4]],
            }),
            "whole": manifest.TensorEntry(dtype="I16", shape=(9,), file=0),
            "tied": manifest.TensorEntry(alias="grid"),
        },
    )  # fmt: skip
    store.create(f"{folder}/manifest.json", manifest.to_bytes(made))
    return made, {**values, "tied": values["grid"]}


def test_tensors_cut_over_several_files_are_put_together(tmp_path):
    store = LocalStore(tmp_path)
    made, values = in_parts(store)
    assert checkpoint.latest(store) == made
    assert_equal(load_all(store, values), values)
    checkpoint.verify(store, made)


def test_two_files_of_one_checkpoint_that_changed_names_are_found(tmp_path):
    store = LocalStore(tmp_path)
    made, _ = in_parts(store)
    one, two = (tmp_path / "checkpoints" / made.folder / name for name in list(made.files)[:2])
    size = max(one.stat().st_size, two.stat().st_size)
    one.rename(one.with_suffix(".away"))
    two.rename(one)
    one.with_suffix(".away").rename(two)
    for path in (one, two):
        os.truncate(path, size)
    with pytest.raises(DamagedError, match=one.name):
        checkpoint.verify(store, made)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("whole", {"dtype": "BF16", "shape": [9], "file": 0}),
        ("whole", {"dtype": "I16", "shape": [3, 3], "file": 0}),
        ("whole", {"dtype": "I16", "shape": [9], "file": 1}),
        ("grid", {"dtype": "I32", "shape": [5, 7], "grid": [3, 1]}),
        ("grid", {"dtype": "F32", "shape": [5, 7], "grid": [1, 3]}),
        ("columns", {"dtype": "F64", "shape": [4, 6, 2], "file": 0}),
    ],
)
def test_a_manifest_that_contradicts_the_shards_headers_is_refused(tmp_path, name, entry):
    import json

    store = LocalStore(tmp_path)
    made, _ = in_parts(store)
    path = tmp_path / "checkpoints" / made.folder / "manifest.json"
    top = json.loads(path.read_bytes())
    del top["checksum"]
    top["tensors"][name] = entry
    body = json.dumps(top)[:-1].encode()
    tail = b',\n"checksum":"%s"\n}\n' % xxhash.xxh3_64_hexdigest(body).encode()
    path.write_bytes(body + tail)
    hostile = checkpoint.latest(store)
    with pytest.raises(CheckpointError, match=name):
        Reader(store, f"checkpoints/{made.folder}", hostile).fetch(name)


# --- a store that fails ------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


SMALL = {"w": torch.arange(1000.0), "n": torch.tensor(3)}


def prepared(root: Path) -> tuple[LocalStore, lineage.Attempt]:
    """Return a store with a committed step 1, and the attempt that committed it."""
    store = LocalStore(root)
    attempt = lineage.begin(store, {})
    save(Writer(store, World(), attempt), SMALL, 1)
    return store, attempt


def calls_of(root: Path, do: Callable[[FaultyStore], Any]) -> int:
    counting = FaultyStore(root)
    do(counting)
    assert counting.calls
    return len(counting.calls)


def newer(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value + 1 for name, value in values.items()}


@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("how", ["before", "torn"])
@pytest.mark.parametrize("error", [StoreError, Killed])
def test_whichever_call_of_a_save_fails_the_step_before_stands_and_loads(
    tmp_path, forever, how, error
):
    _, first = prepared(tmp_path / "counted")
    count = calls_of(
        tmp_path / "counted", lambda store: save(Writer(store, World(), first), newer(SMALL), 2)
    )
    assert count >= 5  # open, put, finish the shard, look for newer attempts, create the manifest
    for n in range(1, count + 1):
        store, attempt = prepared(tmp_path / f"{n}")
        faulty = FaultyStore(tmp_path / f"{n}", n, how, forever=forever, error=error)
        with pytest.raises(error, match="the disk failed"):
            save(Writer(faulty, World(), attempt), newer(SMALL), 2)
        made = checkpoint.latest(store)
        if made.step == 2:  # only where the failure came after everything was done
            assert (how, n) == ("torn", count)
            continue
        checkpoint.verify(store, made)
        assert_equal(load_all(store, SMALL), SMALL)
        save(writer_on(store), newer(SMALL), 2)  # the next attempt is not disturbed by the litter
        assert_equal(load_all(store, SMALL), newer(SMALL))


@pytest.mark.parametrize("error", [StoreError, Killed])
def test_whichever_reply_of_a_save_is_lost_the_latest_is_whole(tmp_path, error):
    _, first = prepared(tmp_path / "counted")
    count = calls_of(
        tmp_path / "counted", lambda store: save(Writer(store, World(), first), newer(SMALL), 2)
    )
    steps = []
    for n in range(1, count + 1):
        store, attempt = prepared(tmp_path / f"{n}")
        faulty = FaultyStore(tmp_path / f"{n}", n, "after", error=error)
        with pytest.raises(error, match="the disk failed"):
            save(Writer(faulty, World(), attempt), newer(SMALL), 2)
        found = checkpoint.latest(store)
        checkpoint.verify(store, found)
        expected = {1: SMALL, 2: newer(SMALL)}[found.step]
        assert_equal(load_all(store, SMALL), expected)
        steps.append(found.step)
    assert steps == [1] * (count - 1) + [2]  # only the manifest's own creation commits


def test_a_commit_whose_reply_was_lost_is_recognised_when_its_step_is_saved_again(tmp_path):
    store, attempt = prepared(tmp_path)
    faulty = FaultyStore(tmp_path)
    writer = Writer(faulty, World(), attempt)
    save(writer, newer(SMALL), 2)
    count = len(faulty.calls)
    faulty.fail_at, faulty.how = 2 * count, "after"
    with pytest.raises(StoreError, match="failed in create"):
        save(writer, newer(SMALL), 3)
    before = keys_on(store)
    save(writer, newer(SMALL), 3)
    assert keys_on(store) == before
    assert checkpoint.latest(store).step == 3
    with pytest.raises(CheckpointError, match="already has a manifest"):
        save(writer, SMALL, 2)  # of that one nothing was unclear


def test_the_next_save_of_the_same_attempt_succeeds_after_each_failure(tmp_path):
    _, first = prepared(tmp_path / "counted")
    count = calls_of(
        tmp_path / "counted", lambda store: save(Writer(store, World(), first), newer(SMALL), 2)
    )
    for n in range(1, count + 1):
        store, attempt = prepared(tmp_path / f"{n}")
        writer = Writer(FaultyStore(tmp_path / f"{n}", n), World(), attempt)
        with pytest.raises(StoreError):
            save(writer, newer(SMALL), 2)
        save(writer, newer(SMALL), 2)
        assert checkpoint.latest(store).step == 2
        assert_equal(load_all(store, SMALL), newer(SMALL))


@pytest.mark.parametrize("how", ["before", "after", "torn"])
def test_a_shard_that_could_not_be_written_leaves_nothing_behind(tmp_path, how):
    store, attempt = prepared(tmp_path)
    before = keys_on(store)
    with pytest.raises(StoreError, match="failed in open_new"):
        save(Writer(FaultyStore(tmp_path, 1, how), World(), attempt), newer(SMALL), 2)
    assert keys_on(store) == before
    assert not list(tmp_path.glob("checkpoints/step-00000002*"))


def test_the_cause_of_a_failed_save_is_told_even_if_cleaning_up_fails_too(tmp_path):
    _, attempt = prepared(tmp_path)
    with pytest.raises(StoreError, match="failed in open_new, call 1"):
        save(Writer(FaultyStore(tmp_path, 1, forever=True), World(), attempt), SMALL, 2)


def test_whichever_read_of_a_load_fails_it_is_no_damage(tmp_path):
    store, _ = prepared(tmp_path)
    made = checkpoint.latest(store)

    def load(faulty: FaultyStore) -> None:
        checkpoint.load(faulty, made, {name: blank(value) for name, value in SMALL.items()})

    for n in range(1, calls_of(tmp_path, load) + 1):
        with pytest.raises(StoreError, match="the disk failed"):
            load(FaultyStore(tmp_path, n))
        with pytest.raises(StoreError, match="the disk failed"):
            load(FaultyStore(tmp_path, n, forever=True))
    checkpoint.verify(store, made)


def test_a_step_that_is_committed_cannot_be_written_again(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    save(writer, SMALL, 1)
    before = keys_on(store)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="already has a manifest"):
            save(writer, newer(SMALL), 1)
    assert keys_on(store) == before
    assert_equal(load_all(store, SMALL), SMALL)
    save(writer, newer(SMALL), 2)
    assert_equal(load_all(store, SMALL), newer(SMALL))


def test_a_second_writer_of_one_attempt_does_not_touch_what_the_first_has_committed(tmp_path):
    store, attempt = prepared(tmp_path)
    before = keys_on(store)
    with pytest.raises(StoreError, match="exists already"):
        save(Writer(store, World(), attempt), newer(SMALL), 1)
    assert keys_on(store) == before
    assert_equal(load_all(store, SMALL), SMALL)


def test_what_fails_before_the_commit_commits_nothing(tmp_path):
    store, attempt = prepared(tmp_path)
    before = keys_on(store)

    def flush() -> None:
        raise CheckpointError("the tracker's disk is full")

    begun = Writer(store, World(), attempt).start_save(
        Content(tensors=SMALL), step=2, before_commit=flush
    )
    with pytest.raises(CheckpointError, match="tracker"):
        begun.result()
    assert checkpoint.latest(store).step == 1
    assert keys_on(store) == before


def test_the_shards_are_there_when_before_commit_is_called_and_the_manifest_is_not(tmp_path):
    store = LocalStore(tmp_path)
    seen: list[str] = []
    begun = writer_on(store).start_save(
        Content(tensors=SMALL),
        step=2,
        before_commit=lambda: seen.extend(store.list("checkpoints")),
    )
    made = begun.result()
    assert seen == [f"checkpoints/{made.folder}/{name}" for name in made.files]
