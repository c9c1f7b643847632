"""Every recipe of conf/experiment runs two steps."""

import gzip
import json
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parents[2] / "conf/experiment").glob("*.yaml"))


@pytest.fixture
def idx(tmp_path):
    """A directory with 300 images to train on and 60 to test, in the format of the real files."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for prefix, count in (("train", 300), ("t10k", 60)):
        images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        labels = bytes([0, 0, 8, 1]) + count.to_bytes(4, "big")
        pixels = bytes((i * 31) % 256 for i in range(count * 784))
        for name, data in (
            (f"{prefix}-images-idx3-ubyte", images + pixels),
            (f"{prefix}-labels-idx1-ubyte", labels + bytes(i % 10 for i in range(count))),
        ):
            (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_experiment_runs_two_steps(command, idx, recipe):
    data = [f"data.dir={idx}"] if "dir:" in recipe.read_text() else []
    cache = {"XDG_CACHE_HOME": str(command.folder / "cache")}
    done = command(f"experiment={recipe.stem}", "trainer.max_steps=2", *data, **cache)
    assert done.returncode == 0, done.stderr
    assert "Finished at step 2" in done.stdout
    run = command.folder / "runs" / recipe.stem
    assert (run / "checkpoints").is_dir()
    assert json.loads((run / "samples/index.json").read_text())["step"] == 2
