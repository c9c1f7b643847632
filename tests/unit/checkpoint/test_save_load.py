"""Round trips of tensors and values through a real directory, and the errors of misfits."""

import math
import re
from collections.abc import Callable
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.saved_tensors import (
    MIB,
    assert_equal,
    blank,
    copied,
    from_bits,
    keys_on,
    load_all,
    ones,
    raw_bytes,
    save,
    writer_on,
)
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import lineage, shard, state_tree
from trainer.checkpoint.memory import as_bits
from trainer.checkpoint.plan import TORCH_DTYPES
from trainer.checkpoint.reader import Reader
from trainer.checkpoint.shard_reader import DamagedError
from trainer.checkpoint.state_tree import Content
from trainer.errors import CheckpointError
from trainer.storage import LocalStore

SHAPE_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "every other": lambda t: t[..., ::2] if t.dim() else t,
    "inner part": lambda t: t[1:] if t.dim() else t,
    "expanded": lambda t: t.expand(3, *t.shape),
    "a view of more": lambda t: torch.stack([as_bits(t), as_bits(t)])[1].view(t.dtype),
}


def tensor_of(dtype: str, shape: list[int], seed: int, change: str) -> Tensor:
    noise = Random(seed).randbytes(math.prod(shape) * TORCH_DTYPES[dtype].itemsize)
    if dtype == "BOOL":
        noise = bytes(value % 2 for value in noise)
    return SHAPE_CHANGES[change](from_bits(noise, TORCH_DTYPES[dtype], shape))


RECIPES = st.tuples(
    st.sampled_from(list(TORCH_DTYPES)),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 255),
    st.sampled_from(sorted(SHAPE_CHANGES)),
)
NAMES = st.text(max_size=8).filter(lambda n: shard.is_key(n) and not re.search("@[0-9,]+$", n))


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, RECIPES, max_size=8))
def test_load_returns_saved_tensors(tmp_path_factory, recipes):
    # created here, as not every tensor has a repr for hypothesis
    check_round_trip(
        tmp_path_factory, {name: tensor_of(*recipe) for name, recipe in recipes.items()}
    )


ODD = {
    "nothing": {},
    "scalars of every dtype": {name: ones((), dtype) for name, dtype in TORCH_DTYPES.items()},
    "empty ones": {name: ones((0, 2), dtype) for name, dtype in TORCH_DTYPES.items()},
    "odd names": {n: torch.ones(i) for i, n in enumerate(["../x", "/", "", "a@0"], 1)},
    "conjugate": {
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
    },
    "not a number": {"nan": torch.tensor([0x7FC00001, -1, 1]).int().view(torch.float32)},
}


@pytest.mark.parametrize("case", ODD)
def test_load_returns_odd_tensors(tmp_path_factory, case):
    check_round_trip(tmp_path_factory, ODD[case])


def check_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Tensor]) -> None:
    store = LocalStore(tmp_path_factory.mktemp("run"))
    expected = {name: copied(value) for name, value in values.items()}
    manifest = save(writer_on(store), values)
    assert checkpoint.latest(store) == manifest
    assert_equal(load_all(store, values), expected)
    assert_equal({name: Reader(store, f"checkpoints/{manifest.folder}", manifest).fetch(name)
                  for name in values}, expected)  # fmt: skip
    checkpoint.verify(store, manifest)


def test_save_rejects_name_equal_to_part_key(tmp_path):
    with pytest.raises(CheckpointError, match="Rename one of them"):
        save(writer_on(LocalStore(tmp_path)), {"w": torch.ones(4), "w@0": torch.ones(3)})


def test_load_restores_tensors_of_many_blocks(tmp_path):
    store = LocalStore(tmp_path)
    sizes = {"one": MIB, "more": MIB + 1, "less": MIB - 1, "many": 5 * MIB + 12345}
    values = {
        name: torch.randint(0, 256, (size,), dtype=torch.uint8) for name, size in sizes.items()
    }
    values["wide"] = torch.randn(300, 1001, dtype=torch.float64)
    save(writer_on(store), values)
    assert_equal(load_all(store, values), values)


def test_load_fills_only_the_view_of_noncontiguous_target(tmp_path):
    store = LocalStore(tmp_path)
    values = {
        "a": torch.arange(12.0).reshape(3, 4),
        "b": torch.arange(3) * (1 + 1j),
        "c": torch.tensor([7.0]),
    }
    save(writer_on(store), values)
    newest = checkpoint.latest(store)
    matrix = torch.full((4, 8), -1.0)
    pairs = torch.full((3, 2), -1.0).to(torch.complex64)
    single = torch.full((4,), -1.0)
    checkpoint.load(
        store, newest, {"a": matrix.t()[1:7:2, :], "b": pairs[:, 1], "c": single[1::3][:1]}
    )
    expected = torch.full((4, 8), -1.0)
    expected.t()[1:7:2, :] = values["a"]
    assert torch.equal(matrix, expected)
    assert single.tolist() == [-1, 7, -1, -1]
    assert torch.equal(pairs[:, 1], values["b"])
    assert torch.equal(pairs[:, 0], torch.full((3,), -1.0).to(torch.complex64))


def test_load_into_parameters_records_no_gradient(tmp_path):
    store = LocalStore(tmp_path)
    model = nn.Linear(3, 2)
    save(writer_on(store), state_tree.model_targets(model))
    other = nn.Linear(3, 2)
    checkpoint.load(store, checkpoint.latest(store), state_tree.model_targets(other))
    assert torch.equal(other.weight, model.weight)
    assert other.weight.requires_grad
    assert other.weight.grad_fn is None


def test_load_restores_numbers_objects_and_config(tmp_path):
    store = LocalStore(tmp_path)
    objects = {"run": {"cursor": {"epoch": 1}, "milestones": {3: 1}}, "x": (1, float("inf"))}
    manifest = checkpoint.save(
        writer_on(store),
        Content(objects=objects),
        step=12,
        epoch=3,
        samples=4567,
        config={"optimizer": {"lr": 0.1}},
    )
    newest = checkpoint.latest(store)
    assert newest == manifest
    assert (newest.step, newest.epoch, newest.samples, newest.attempt) == (12, 3, 4567, 1)
    assert (newest.objects, newest.config) == (objects, {"optimizer": {"lr": 0.1}})


def test_consecutive_saves_share_buffer_and_keep_content(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    history = {}
    for step, size in enumerate((3000, 10, 2000, 2000, 1), start=1):
        history[step] = {"w": torch.randn(size), "n": torch.tensor(step)}
        save(writer, history[step], step)
    assert [commit.step for commit in checkpoint.steps(store)] == [1, 2, 3, 4, 5]
    for commit in checkpoint.steps(store):
        manifest = lineage.read_manifest(store, commit)
        targets = {name: blank(value) for name, value in history[commit.step].items()}
        checkpoint.load(store, manifest, targets)
        assert_equal(targets, history[commit.step])


def test_latest_without_checkpoints_is_none(tmp_path):
    assert checkpoint.latest(LocalStore(tmp_path / "absent")) is None
    assert checkpoint.steps(LocalStore(tmp_path / "absent")) == []


def test_delete_makes_previous_checkpoint_latest(tmp_path):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    for step in (1, 2):
        save(writer, {"w": torch.ones(step)}, step)
    checkpoint.delete(store, checkpoint.steps(store)[-1])
    assert checkpoint.latest(store).step == 1
    assert all("step-00000001." in key for key in keys_on(store))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.zeros(2).to_sparse(), "only dense tensors"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8),
            r"quint8, .* int_repr\(\)",
        ),
    ],
    ids=["sparse", "quantized"],
)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_save_rejects_unsupported_tensor_by_name(tmp_path, make, reason):
    store = LocalStore(tmp_path)
    writer = writer_on(store)
    with pytest.raises(CheckpointError, match="'odd'") as caught:
        save(writer, {"fine": torch.ones(1), "odd": make()})
    assert re.search(reason, str(caught.value))
    assert keys_on(store) == set()
    save(writer, {"fine": torch.ones(1)})
    assert checkpoint.latest(store).step == 1


@pytest.mark.parametrize("name", [*sorted(shard.RESERVED), "a\udc80"])
def test_save_rejects_reserved_or_invalid_name(tmp_path, name):
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        save(writer_on(LocalStore(tmp_path)), {name: torch.ones(1)})


def test_save_rejects_unsupported_object_before_writing(tmp_path):
    store = LocalStore(tmp_path)
    with pytest.raises(CheckpointError, match=r"objects\.scheduler\.rule is a builtins\.object"):
        save(writer_on(store), {"w": torch.ones(1)}, objects={"scheduler": {"rule": object()}})
    assert keys_on(store) == set()


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("absent", torch.zeros(2, 3), "no tensor 'absent'"),
        ("w", torch.zeros(3, 2), r"F32 \[2, 3\], this model needs F32 \[3, 2\]"),
        ("w", torch.zeros(6), r"needs F32 \[6\]"),
        ("w", torch.zeros(2, 3, 1), r"needs F32 \[2, 3, 1\]"),
        ("w", torch.zeros(2, 3, dtype=torch.int32), r"needs I32 \[2, 3\]"),
        ("w", torch.zeros(2, 3, dtype=torch.float64), r"needs F64 \[2, 3\]"),
        ("w", ones((2, 3), torch.float8_e8m0fnu), "needs F8_E8M0"),
        ("c", torch.zeros(2, 2, dtype=torch.float64), r"C128 \[2\]"),
    ],
)
def test_load_rejects_mismatched_target_unchanged(tmp_path, name, target, reason):
    store = LocalStore(tmp_path)
    manifest = save(
        writer_on(store), {"w": torch.ones(2, 3), "c": torch.ones(2, dtype=torch.complex128)}
    )
    before = raw_bytes(target)
    with pytest.raises(CheckpointError, match=reason) as caught:
        checkpoint.load(store, manifest, {name: target})
    assert not isinstance(caught.value, DamagedError)
    assert raw_bytes(target) == before


def test_fetch_rejects_missing_name(tmp_path):
    store = LocalStore(tmp_path)
    manifest = save(writer_on(store), {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no tensor 'absent'"):
        Reader(store, f"checkpoints/{manifest.folder}", manifest).fetch("absent")
