"""Manifests: one with every feature, hand-written ones, and ones committed without shards."""

import json
import math
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from trainer.checkpoint import manifest
from trainer.checkpoint.lineage import Commit
from trainer.checkpoint.manifest import Manifest, ShardFile, TensorEntry
from trainer.checkpoint.values import TensorRef
from trainer.errors import CheckpointError
from trainer.storage import Store

GOLDEN = Path(__file__).parents[1] / "golden" / "manifest.json"
GOLDEN_V1 = GOLDEN.with_name("manifest-v1.json")


def sample() -> Manifest:
    """Return a manifest that uses every feature of the format, as in the golden file."""
    names = [
        manifest.shard_name(rank=rank, world_size=4, token="9f2c41aa", save=7) for rank in range(4)
    ]
    return Manifest(
        step=1200,
        epoch=3,
        samples=76800,
        attempt=3,
        token="9f2c41aa",
        save=7,
        world_size=4,
        versions={"torch": "2.11.0"},
        tensors={
            "model.weight": TensorEntry(dtype="BF16", shape=(4, 3), file=2),
            "model.tied": TensorEntry(alias="model.weight"),
            "model.sharded": TensorEntry(dtype="F32", shape=(5, 2), grid=(3, 1)),
            "model.cut": TensorEntry(
                dtype="I8",
                shape=(2, 3),
                columns={"file": [0, 3], "offsets": [[0, 0], [0, 1]], "lengths": [[2, 1], [2, 2]]},
            ),
            "model.replicated": TensorEntry(
                dtype="F8_E8M0", shape=(6,), grid=(2,), file_list=(3, 1)
            ),
            "optimizer.step": TensorEntry(dtype="F32", shape=(), file=0),
            "empty": TensorEntry(dtype="C128", shape=(0, 7), file=1),
        },
        files={
            name: ShardFile(8192 + rank, 4096, f"{rank:016x}", f"{rank + 8:016x}")
            for rank, name in enumerate(names)
        },
        objects={
            "scheduler": {"milestones": Counter({3: 1, 6: 2}), "best": -math.inf},
            "tree": [(1, 2.5), None, True, b"\x00\xff", 1 + 2j, {5}, OrderedDict(a=TensorRef("t"))],
            "numpy": np.float32(1.5),
            "naïve": "Ünïcode \U0001f600",
            "large": [2**53, 2**53 + 1, -(2**70)],
        },
        config={"optimizer": {"lr": 0.1, "_target_": "torch.optim.SGD"}},
    )


def sealed(top: dict[str, Any] | str) -> bytes:
    """Serialize any content as a manifest with a correct checksum, as documented."""
    lines = top if isinstance(top, str) else ",\n".join(
        f"{json.dumps(key)}:{json.dumps(value)}" for key, value in top.items()
    )  # fmt: skip
    body = ("{\n" + lines).encode()
    return body + b',\n"checksum":"%s"\n}\n' % xxhash.xxh3_64_hexdigest(body).encode()


def parsed_golden() -> dict[str, Any]:
    top = json.loads(GOLDEN.read_bytes())
    del top["checksum"]
    return top


def rejection(data: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        manifest.from_bytes(data, "here/manifest.json")
    assert str(caught.value).startswith("here/manifest.json: ")
    return caught.value


def commit_manifest(
    stores: Store | list[Store],
    step: int,
    run: Any = None,
    *,
    attempt: int = 1,
    config: dict[str, Any] | None = None,
) -> Commit:
    """Create a checkpoint's manifest in one or more stores.

    Args:
        stores: where to create it.
        step: the step.
        run: the checkpoint's run state.
        attempt: number of the attempt.
        config: the checkpoint's configuration.
    """
    objects = {"run": {} if run is None else run}
    current = replace(sample(), step=step, attempt=attempt, objects=objects, config=config or {})
    commit = Commit(step, attempt, f"checkpoints/{current.folder}")
    for store in stores if isinstance(stores, list) else [stores]:
        store.create(commit.manifest_key, manifest.to_bytes(current))
    return commit


def evaluated(step: int, **metrics: Any) -> dict[str, Any]:
    """Return the run state of a checkpoint with an evaluation at its own step."""
    return {"last_eval_step": step, "metrics": metrics}


def spoil(store: Store, commit: Commit) -> None:
    """Change one byte of a manifest."""
    data = bytearray(store.read(commit.manifest_key))
    data[len(data) // 2] ^= 1
    store.replace(commit.manifest_key, bytes(data))
