"""Snapshots are consistent although training continues during the copy."""

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.checkpoint.snapshot import Snapshot
from trainer.checkpoint.writer import Writer
from trainer.cluster.world import World
from trainer.errors import CheckpointError
from trainer.storage import LocalStore

COUNT = 3_000_000  # floats of each tensor; copying them takes some milliseconds


class Counting:
    """Parameters and momenta of which every value is the number of updates, at every moment."""

    def __init__(self, count: int = COUNT) -> None:
        self.parameters = [torch.zeros(count), torch.zeros(7, count // 7)]
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, -1.0)
        self.optimizer = torch.optim.SGD(self.parameters, lr=1.0, momentum=0.0)

    def tensors(self) -> dict[str, Tensor]:
        return {f"p{n}": parameter for n, parameter in enumerate(self.parameters)}

    def content(self) -> checkpoint.Content:
        return checkpoint.Content(tensors=self.tensors(), deferrable=set(self.tensors()))


def writer_on(store: LocalStore) -> Writer:
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": None})
    return Writer(store, World(), attempt)


def values_of(store: LocalStore, manifest_: checkpoint.Manifest) -> set[float]:
    """Return the different values of all tensors of a checkpoint."""
    reader = checkpoint.Reader(store, f"{lineage.FOLDER}/{manifest_.folder}", manifest_)
    return {float(value) for name in manifest_.tensors for value in reader.fetch(name).unique()}


class Gate:
    """Holds back the copy of a snapshot until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        copy: Callable[..., None] = Snapshot._copy_deferred

        def held_back(*arguments) -> None:
            assert self.opened.wait(120)
            copy(*arguments)

        monkeypatch.setattr(Snapshot, "_copy_deferred", held_back)


def test_checkpoint_has_values_of_its_step_while_training_continues(tmp_path):
    store, training = LocalStore(tmp_path), Counting()
    writer, manifests = writer_on(store), []
    for step in range(20):
        save = writer.start_save(training.content(), step=step)
        training.optimizer.step()
        training.optimizer.step()
        manifests.append(save.result())
        training.optimizer.zero_grad(set_to_none=False)
        for parameter in training.parameters:
            parameter.grad.fill_(-1.0)
    for step, manifest_ in enumerate(manifests):
        assert values_of(store, manifest_) == {2.0 * step}


def test_only_the_update_waits_for_the_copy(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    store, training = LocalStore(tmp_path), Counting(count=7000)
    save = writer_on(store).start_save(training.content(), step=1)
    loss = (training.parameters[0].clone().requires_grad_() * 2).sum()
    loss.backward()  # forward and backward continue
    updating = threading.Thread(target=training.optimizer.step)
    updating.start()
    updating.join(0.3)
    assert updating.is_alive()  # at any time, as long as the gate is closed
    assert training.parameters[0].unique().tolist() == [0.0]
    gate.opened.set()
    updating.join()
    assert values_of(store, save.result()) == {0.0}
    assert training.parameters[0].unique().tolist() == [1.0]


def test_tensor_changed_between_updates_is_copied_immediately_afterwards(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    store, training = LocalStore(tmp_path), Counting(count=7000)
    writer = writer_on(store)
    save = writer.start_save(training.content(), step=1)
    training.parameters[1].add_(5.0)  # not by Optimizer.step
    gate.opened.set()
    with pytest.raises(CheckpointError, match="p1 changed between two updates"):
        save.result()
    assert checkpoint.latest(store) is None
    gate.opened.clear()
    save = writer.start_save(training.content(), step=2)
    training.parameters[1].add_(5.0)
    gate.opened.set()
    assert values_of(store, save.result()) == {0.0, 5.0}


def test_tensor_not_deferrable_is_copied_before_start_returns(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    store, count = LocalStore(tmp_path), torch.zeros(1000)
    save = writer_on(store).start_save(checkpoint.Content(tensors={"count": count}), step=1)
    count.add_(1.0)
    gate.opened.set()
    assert values_of(store, save.result()) == {0.0}


def test_deleted_snapshot_does_not_block_optimizers(tmp_path, monkeypatch):
    training = Counting(count=7000)
    writer = writer_on(LocalStore(tmp_path))
    writer.start_save(training.content(), step=1).result()
    waited = []
    monkeypatch.setattr(Snapshot, "wait", lambda snapshot, *_: waited.append(id(snapshot)))
    mine, reference = id(writer._snapshot), weakref.ref(writer._snapshot)
    training.optimizer.step()
    assert mine in waited
    del writer
    for thread in threading.enumerate():
        if thread.name == "checkpoint-snapshot":
            thread.join()
    gc.collect()
    assert reference() is None
    waited.clear()
    training.optimizer.step()
    assert mine not in waited  # a snapshot of another test may be alive, and is asked
