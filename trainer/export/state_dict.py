"""`format=state_dict`: what `torch.load(path, weights_only=True)` returns as a dict of tensors."""

from pathlib import Path

import torch
from torch import Tensor

SUFFIX = ".pt"


def write(weights: dict[str, Tensor], path: Path) -> None:
    """Write the weights as a plain state dict; shared storage stays shared."""
    with open(path, "wb") as file:  # by its name, torch would put that name into the file
        torch.save(weights, file)
