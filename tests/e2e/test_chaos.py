"""Kills at random instants lose nothing: scripts/chaos.py with a few; `make chaos` is for many."""

import re
import subprocess
import sys

import pytest
from support.run_commands import ROOT


@pytest.mark.slow
def test_twenty_kills_at_random_instants_lose_nothing(tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "scripts.chaos", "--kills", "20", "--ranks", "1,2",
            "--folder", tmp_path / "chaos",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every promise held." in done.stdout
    rows = re.findall(r"^ *(\S.*?)  +(\d+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    total = {name: int(all_ranks) for name, _, _, all_ranks in rows}
    assert total["kills"] == 20
    assert total["training alone"] + total["a save: shards"] + total["a save: manifest"] >= 1
    assert total["runs that ended bit-identical"] >= 2
