"""The model to export: a checkpoint's weights, the rebuilt module, and sample inputs for it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import Run
from trainer.errors import ConfigError, closest
from trainer.export import rebuild, samples
from trainer.export.calls import Call, outputs_of
from trainer.export.loaded_checkpoint import LoadedCheckpoint
from trainer.importing.name_matching import clean_names

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Weights, dtype, submodule and sample inputs of an export."""

    averaged: bool | None = None
    """Export the averages of the weights; None: if the run's optimizer has an evaluation mode."""
    dtype: str = ""
    """A key of DTYPES for floating-point weights and inputs; empty: unchanged."""
    device: str = "cpu"
    """Device on which the model is traced and compared."""
    part: str = ""
    """Submodule to export; empty: the complete model."""
    inputs: str = ""
    """Input description, see `samples.random_inputs`; empty: inputs from the task."""
    settings: Sequence[str] = ()
    """`key=value` overrides of the checkpoint's configuration."""
    allowed: Sequence[str] = ()
    """Targets the configuration may call in addition to `allowed_targets.ALLOWED`."""


class ExportedModel:
    """The weights and the module of a checkpoint; the module is built on first use.

    Args:
        checkpoint: the checkpoint.
        choices: weights, dtype, submodule and sample inputs.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, choices: Choices = Choices()) -> None:
        self.checkpoint = checkpoint
        self.choices = choices
        self._device = torch.device(choices.device)
        self._dtype = DTYPES.get(choices.dtype)
        self._prefix = f"{choices.part}." if choices.part else ""

    @property
    def averaged(self) -> bool:
        """True if the averages of the weights are exported."""
        if self.choices.averaged is None:
            return self.checkpoint.has_evaluation_mode
        return self.choices.averaged

    def weights(self) -> dict[str, Tensor]:
        """Return the selected tensors on the CPU, cast, under the plain model's names.

        Names that share storage get the same tensor. Needs no configuration.

        Raises:
            ConfigError: the checkpoint has no model, or not the requested submodule.
            DamagedError: a checksum differs.
        """
        tensors = self.checkpoint.weights(averaged=self.averaged)
        selected = {
            name.removeprefix(self._prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(self._prefix)
        }
        if not selected:
            raise _no_part(self.choices.part, {name.partition(".")[0] for name in tensors})
        cast = {id(tensor): self._cast(tensor) for tensor in selected.values()}
        return {name: cast[id(tensor)] for name, tensor in selected.items()}

    def tensor_names(self) -> list[str]:
        """Return the names of `weights` without reading them."""
        names = clean_names(self.checkpoint.model_names()).values()
        return [n.removeprefix(self._prefix) for n in names if n.startswith(self._prefix)]

    @cached_property
    def run(self) -> Run:
        """The validated configuration; see `rebuild.configuration`."""
        return rebuild.configuration(self.checkpoint, self.choices.settings, self.choices.allowed)

    @cached_property
    def module(self) -> nn.Module:
        """The module with these weights, in eval mode on the selected device; read-only.

        Raises:
            ConfigError: the configuration calls a target that is not allowed, or the weights do
                not fit the module.
            DamagedError: a checksum differs.
        """
        try:
            return self._root.get_submodule(self.choices.part)
        except AttributeError:
            raise _no_part(self.choices.part, dict(self._root.named_children())) from None

    @cached_property
    def _root(self) -> nn.Module:
        model = rebuild.load_model(self.run, self.checkpoint, averaged=self.averaged)
        config: Any = getattr(model, "config", None)
        if getattr(config, "use_cache", None) is True:  # of transformers: state between calls
            config.use_cache = False
        return model.to(device=self._device, dtype=self._dtype)

    # --- sample inputs and outputs -------------------------------------------------------------

    @cached_property
    def _sampler(self) -> samples.Sampler:
        return samples.Sampler(
            self.run, self._root, self.module, self.choices.inputs, self._dtype, self._device
        )

    @property
    def data(self) -> object | None:
        """The run's data source; None if its data is not available."""
        return self._sampler.data

    @property
    def sample_origin(self) -> str:
        """Text on the origin of the samples: `evaluation data`, `random values (…)`."""
        return self._sampler.origin

    def call(self, count: int) -> Call:
        """Return a call of the module with `count` samples along the first axis.

        The samples are the first of the evaluation data, as the task passes them to the model.
        """
        call = self._sampler.call(count)
        return call.map(lambda tensor: self._cast(tensor).to(self._device))

    def inputs(self, count: int) -> dict[str, Tensor]:
        """Return the tensors of `call(count)` by name."""
        return self.call(count).tensors()

    @cached_property
    def _layout(self) -> Call:
        return self.call(2)

    def compute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the module's outputs for these inputs, under names that no input has."""
        arguments, keywords = self._layout.with_tensors(inputs[n] for n in self._layout.names)
        try:
            with torch.no_grad():
                outputs = outputs_of(self.module(*arguments, **keywords))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise ConfigError(
                f"{type(self.module).__name__} cannot be called with {shapes} "
                f"({self.sample_origin}): {error}\nDescribe its inputs with {samples.GRAMMAR}"
            ) from error
        names = self._layout.names
        return {f"{n}_out" if n in names else n: tensor for n, tensor in outputs.items()}

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Output names, in order."""
        return tuple(self.compute(self.inputs(2)))

    def _cast(self, tensor: Tensor) -> Tensor:
        is_cast = self._dtype is not None and tensor.is_floating_point()
        return tensor.to(self._dtype) if is_cast else tensor


def _no_part(part: str, names: Iterable[str]) -> ConfigError:
    return ConfigError(f"part={part}: the model has no submodule {part!r}{closest(part, names)}")
