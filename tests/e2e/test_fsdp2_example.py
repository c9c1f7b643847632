"""The example of the docs: FSDP2 in a hand-written loop, stopped and restarted."""

import subprocess
import sys

import pytest
from support.run_commands import ROOT

EXAMPLE = ROOT / "docs/examples/fsdp2_with_dcp.py"


def train(folder, last_step: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         EXAMPLE, folder, str(last_step)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_example_resumes_and_ends_with_the_same_bits(tmp_path):
    undisturbed = train(tmp_path / "undisturbed", 30)
    assert "from the beginning" in train(tmp_path / "broken", 10)
    resumed = train(tmp_path / "broken", 30)
    assert "from the beginning" not in resumed
    assert "step 30: saved" in undisturbed
    assert "step 30: saved" in resumed
    compared = subprocess.run(
        [sys.executable, "-m", "trainer.checkpoints", "diff", tmp_path / "undisturbed",
         tmp_path / "broken", "step=30"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert len(EXAMPLE.read_text().splitlines()) < 60
