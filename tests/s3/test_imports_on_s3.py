"""Folders that leave into a bucket and come back from it."""

import uuid

import pytest
import torch
from support.state_dicts import net

from scripts.s3_server import BUCKET
from trainer.checkpoint import Content, Writer, lineage, save, state_tree
from trainer.cluster.world import World
from trainer.config.schema import Init
from trainer.core.state import State
from trainer.export.exporting import export
from trainer.importing import weights
from trainer.storage import open_store


@pytest.mark.parametrize(("format", "options"), [
    ("oneflow", {}), ("safetensors", {"max_shard_bytes": "100"}), ("checkpoint", {}),
])  # fmt: skip
def test_what_was_exported_to_a_bucket_fills_a_model(s3, format, options):
    place = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = open_store(place)
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    content = Content(objects={"run": State(step=3).state_dict()})
    given = net(1)
    state_tree.add_model(content, given, with_buffers=True)
    state_tree.add_optimizers(content, given, [torch.optim.SGD(given.parameters())])
    save(Writer(store, World(), attempt), content, step=3, config={})
    done = export(place, format, options=options)
    assert done.url.startswith(f"{place}/exports/")
    model = net(2)
    weights.load(model, Init(weights=done.url))
    expected = net(1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
