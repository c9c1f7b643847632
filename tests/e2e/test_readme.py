"""The README's commands run, and its links exist."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_tour_commands_run_in_order(command):
    """All `python -m` commands; the `make` commands have a test of their own, in a fresh clone."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "python -m" in line]
    assert len(lines) == 13
    outputs = []
    for line in lines:
        bash = line.replace("python -m", f"{sys.executable} -m")
        done = subprocess.run(
            ["bash", "-c", bash],
            cwd=command.folder,
            env=command.env,
            capture_output=True,
            text=True,
        )  # fmt: skip
        outputs.append(done)
    killed, resumed, finished, exported, *looked, listed, checked, two, helped = outputs
    assert "Finished" not in killed.stdout
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resuming from step \d+; \d+ steps left|Finished at step 880", resumed.stdout)
    assert finished.returncode == 0
    assert "is finished" in finished.stdout
    assert exported.returncode == 0, exported.stderr
    for done in looked:
        assert done.returncode == 0, done.stderr
    traced, predicted, reported, tabled, examined = (done.stdout for done in looked)
    assert "compared with the model on evaluation data" in traced
    assert re.search(r"accuracy 0\.\d+ of 359", predicted)
    assert "runs/tour/report.html" in reported
    assert "tour" in tabled
    assert "No problem found" in examined
    assert listed.returncode == 0, listed.stderr
    assert re.search(r"880 +\d+ .* intact", listed.stdout)
    assert checked.returncode == 2
    assert "torch.optim.Adam has no argument 'lrr' (did you mean 'lr'?)" in checked.stderr
    assert two.returncode == 0, two.stderr
    assert ": 2 ranks (" in two.stdout
    assert helped.returncode == 0
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=command.folder, env=command.env, capture_output=True
    )
    assert loaded.returncode == 0, loaded.stderr


def test_default_run_reaches_the_readme_accuracy(command):
    done = command()
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"Finished .* accuracy (\S+)", done.stdout)[1])
    assert accuracy >= 0.97
    for line in ("run directory", "metrics", "continue", "export"):
        assert f"\n  {line} " in done.stdout


def test_links_and_files_named_in_the_documents_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
