"""Kills of trainers and of the server lose nothing: scripts/chaos_s3.py with six kills."""

import re
import subprocess
import sys

from support.run_commands import ROOT


def test_kills_of_trainers_and_servers_lose_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chaos_s3", "--kills", "6"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every promise held." in done.stdout
    kills = {
        target: int(count)
        for target, count in re.findall(r"^kills (.*?) +(\d+)$", done.stdout, re.M)
    }
    assert kills["in all"] == 6
    assert kills["of the server"] >= 1
