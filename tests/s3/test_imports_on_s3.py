"""Exports written to a bucket and imported from it."""

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
def test_export_in_a_bucket_loads_into_a_model(s3, format, options):
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    store = open_store(url)
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    content = Content(objects={"run": State(step=3).state_dict()})
    original = net(1)
    state_tree.add_model(content, original, with_buffers=True)
    state_tree.add_optimizers(content, original, [torch.optim.SGD(original.parameters())])
    save(Writer(store, World(), attempt), content, step=3, config={})
    done = export(url, format, options=options)
    assert done.url.startswith(f"{url}/exports/")
    model = net(2)
    weights.load(model, Init(weights=done.url))
    expected = net(1).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
