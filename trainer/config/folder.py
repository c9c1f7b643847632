"""The folder of the shipped Hydra configuration."""

from pathlib import Path


def conf_folder() -> Path:
    """Return the folder of the shipped configuration: installed, or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    installed = here / "conf"
    return installed if installed.is_dir() else here.parent / "conf"
