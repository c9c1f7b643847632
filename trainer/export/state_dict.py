"""`format=state_dict`: a dict of tensors for `torch.load(path, weights_only=True)`."""

from collections.abc import Mapping
from pathlib import Path

from trainer.export.exported_model import ExportedModel
from trainer.export.training_state import save


def write(model: ExportedModel, path: Path, options: Mapping[str, str]) -> None:
    """Write the weights with torch.save."""
    save(model.weights(), path)
