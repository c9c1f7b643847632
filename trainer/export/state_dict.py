"""`format=state_dict`: what `torch.load(path, weights_only=True)` returns as a dict of tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch

from trainer.export.subject import Subject

SUFFIX = ".pt"
OPTIONS: Mapping[str, str] = {}
HELP: Mapping[str, str] = {}


def write(subject: Subject, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights as a plain state dict; shared storage stays shared."""
    with open(path, "wb") as file:  # by its name, torch would put that name into the file
        torch.save(subject.weights(), file)
