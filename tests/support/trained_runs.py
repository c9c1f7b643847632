"""Small runs of real configurations, trained a few steps in this process."""

from contextlib import contextmanager

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from trainer.checkpoint import Writer, lineage, save
from trainer.cluster.world import World
from trainer.config.compose import conf_folder
from trainer.config.merge import merge
from trainer.config.redact import stored
from trainer.config.schema import Run
from trainer.core.state import State
from trainer.storage import open_store
from trainer.tracking.several import Silent
from trainer.training import build
from trainer.training.contents import collect
from trainer.training.step import train_step


@contextmanager
def composed(*overrides):
    """Compose as trainer/run.py does."""
    schema = OmegaConf.to_container(OmegaConf.structured(Run))
    ConfigStore.instance().store(name="schema", node=schema)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        node = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(node)  # for ${hydra:…}
    OmegaConf.set_struct(node, False)
    del node["hydra"]
    try:
        yield node
    finally:
        HydraConfig.instance().cfg = None


def a_trained_run(folder, *overrides, steps=3, accuracy=0.5, changes=None):
    """Train `steps` steps and commit a checkpoint; return the run's directory as text.

    `changes` are keys of the configuration that the checkpoint claims to have been made with.
    """
    small = ["trainer.global_batch_size=8", "checkpoint.metric=accuracy"]
    with composed(*small, *overrides) as node:
        run, problems = merge(node)
        assert problems == []
        plain = stored(node)
    job = build.build_job(run, World(), build.build_data(run), Silent())
    job.model.train()
    state, store = State(), open_store(str(folder))
    batches = job.data.batches(state.cursor)
    for _ in range(steps):
        microbatches, cursor = next(batches)
        _, applied = train_step(job, microbatches)
        state.advance(cursor, samples=8, applied=all(applied))
    state.evaluated({"accuracy": accuracy}, metric="accuracy", mode="max")
    attempt = lineage.begin(store, {})
    lineage.amend(store, attempt, {"resumed_from": {"step": 0, "attempt": None}})
    content = collect(job, state)
    save(Writer(store, World(), attempt), content, step=steps, config={**plain, **(changes or {})})
    return str(folder)


def reference(path_of_run, inputs, **options):
    """Return what the run's model answers, built and loaded without the code under test."""
    from safetensors.torch import load_file

    from trainer.export.exporting import export

    done = export(path_of_run, "safetensors", out=f"{path_of_run}/weights.safetensors")
    model = options["model"].eval()
    model.load_state_dict(load_file(done.path))
    with torch.no_grad():
        return model(*inputs)
