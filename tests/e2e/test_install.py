"""From a clean clone: the two commands of the README, and an ordinary installation."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=900, **options)


@pytest.fixture
def clone(tmp_path):
    cloned = run("git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone"))
    if cloned.returncode:
        pytest.fail(cloned.stderr)
    return tmp_path / "clone"


@pytest.mark.cluster
def test_make_train_in_a_fresh_clone(clone):
    done = run("make", "train", "ARGS=model=mlp trainer.max_epochs=3", cwd=clone)
    assert done.returncode == 0, done.stderr
    assert "Finished at step 66" in done.stdout
    assert (clone / "runs/digits-mlp/metrics.jsonl").exists()


@pytest.mark.cluster
def test_wheel_works_from_any_directory(clone, tmp_path):
    """Dependencies come from this environment; the project itself is installed anew."""
    venv, folder = tmp_path / "venv", tmp_path / "elsewhere"
    folder.mkdir()
    assert run(sys.executable, "-m", "venv", str(venv)).returncode == 0
    python = str(venv / "bin/python")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(clone))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("perdure-*.whl")
    installed = run(python, "-m", "pip", "install", "--no-deps", str(wheel))
    assert installed.returncode == 0, installed.stderr
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    listed = run(python, "-m", "trainer", cwd=folder)
    assert listed.returncode == 0, listed.stderr
    names = re.findall(r"python -m (trainer\.\w+)", listed.stdout)
    assert len(names) >= 8
    looked = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    imported = run(python, "-c", looked, *names, cwd=folder)
    assert imported.returncode == 0, imported.stderr
    done = run(python, "-m", "trainer.run", "data=synthetic", "trainer.max_steps=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/synthetic-cnn/config.yaml").exists()
    reported = run(python, "-m", "trainer.report", "runs/synthetic-cnn", cwd=folder)
    assert reported.returncode == 0, reported.stderr
    assert "uPlot" in (folder / "runs/synthetic-cnn/report.html").read_text()
    (folder / "models").mkdir()
    (folder / "models/__init__.py").touch()
    shadowed = run(python, "-m", "trainer.run", "--check", cwd=folder)
    assert shadowed.returncode == 2
    assert str(folder / "models") in shadowed.stderr
    assert "hides Perdure's" in shadowed.stderr
