"""What is exported: a checkpoint's weights, its model again, and samples to call it with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import Run
from trainer.errors import ConfigError, closest
from trainer.export import rebuild, samples
from trainer.export.calls import Call, outputs_of
from trainer.export.source import Source
from trainer.importing.name_matching import clean_names

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What of a checkpoint is exported, and how."""

    averaged: bool = False
    """The moving averages of the weights instead of them."""
    dtype: str = ""
    """Of floating-point weights and inputs: a key of DTYPES; empty: as they are."""
    device: str = "cpu"
    """Where the model is traced and compared."""
    part: str = ""
    """Name of a submodule that is exported alone; empty: the whole model."""
    inputs: str = ""
    """What the model takes, see `samples.described`; empty: what the task calls it with."""
    settings: Sequence[str] = ()
    """`key=value` to change in the checkpoint's configuration."""
    allowed: Sequence[str] = ()
    """What the configuration may call besides `trust.ALLOWED`."""


class Subject:
    """A checkpoint to export. The model is built when it is first asked for, and then kept.

    Args:
        source: the checkpoint.
        choices: what of it is wanted.
    """

    def __init__(self, source: Source, choices: Choices = Choices()) -> None:
        self.source = source
        self.choices = choices
        self.device = torch.device(choices.device)
        self.dtype = DTYPES.get(choices.dtype)

    def weights(self) -> dict[str, Tensor]:
        """Return the chosen tensors on the CPU, cast, under the plain model's names.

        Names that share storage come as the same tensor. Needs no configuration.

        Raises:
            ConfigError: there is no model in the checkpoint, or not the part that was asked for.
            DamagedError: the checkpoint's bytes are wrong.
        """
        tensors = self.source.weights(averaged=self.choices.averaged)
        prefix = f"{self.choices.part}." if self.choices.part else ""
        chosen = {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        if not chosen:
            raise _no_part(self.choices.part, {name.partition(".")[0] for name in tensors})
        cast = {id(tensor): self.cast(tensor) for tensor in chosen.values()}
        return {name: cast[id(tensor)] for name, tensor in chosen.items()}

    def tensor_names(self) -> list[str]:
        """Return the names of `weights`, without reading them."""
        names = [n.removeprefix("model.") for n in self.source.manifest.tensors if _is_model(n)]
        prefix = f"{self.choices.part}." if self.choices.part else ""
        return [n.removeprefix(prefix) for n in clean_names(names).values() if n.startswith(prefix)]

    def model(self) -> nn.Module:
        """Return the model with these weights, in eval mode on the chosen device; do not change it.

        Raises:
            ConfigError: the configuration calls what is not allowed, or does not fit the weights.
            DamagedError: the checkpoint's bytes are wrong.
        """
        return self._model

    def inputs(self, count: int) -> dict[str, Tensor]:
        """Return tensors to call the model with, `count` samples along the first axis, by name.

        They are the first of the evaluation data, as the task hands them to the model.
        """
        return self.call(count).tensors()

    def call(self, count: int) -> Call:
        """Return a whole call of the model with `count` samples: `inputs`, and where they go."""
        return self._sampler.call(count).moved(lambda tensor: self.cast(tensor).to(self.device))

    def answer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the model itself says to these inputs, by the names of `outputs`."""
        arguments, keywords = self._layout.filled(iter([inputs[n] for n in self._layout.names]))
        try:
            with torch.no_grad():
                return self.named(outputs_of(self._model(*arguments, **keywords)))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            given = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise ConfigError(
                f"{type(self._model).__name__} cannot be called with {given} ({self.origin}): "
                f"{error}\nSay what it takes: {samples.GRAMMAR}"
            ) from error

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the model's arguments."""
        return self._layout.names

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(self.answer(self.inputs(2)))

    @property
    def origin(self) -> str:
        """Where the samples come from, for people: `evaluation data`, `random values (…)`."""
        return self._sampler.origin

    @cached_property
    def run(self) -> Run:
        """The configuration, judged; see `rebuild.configuration`."""
        return rebuild.configuration(self.source, self.choices.settings, self.choices.allowed)

    @property
    def data(self) -> object | None:
        """The run's data source, None where its data is not here."""
        return self._sampler.data

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a floating-point tensor in the chosen dtype, any other as it is."""
        wanted = self.dtype is not None and tensor.is_floating_point()
        return tensor.to(self.dtype) if wanted else tensor

    def named(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return outputs under names that no input has."""
        taken = self._layout.names
        return {f"{n}_out" if n in taken else n: tensor for n, tensor in outputs.items()}

    @cached_property
    def _whole(self) -> nn.Module:
        model = rebuild.load_model(self.run, self.source, averaged=self.choices.averaged)
        config: Any = getattr(model, "config", None)
        if getattr(config, "use_cache", None) is True:  # of transformers: state between calls
            config.use_cache = False
        return model.to(device=self.device, dtype=self.dtype)

    @cached_property
    def _model(self) -> nn.Module:
        try:
            return self._whole.get_submodule(self.choices.part)
        except AttributeError:
            raise _no_part(self.choices.part, dict(self._whole.named_children())) from None

    @cached_property
    def _sampler(self) -> samples.Sampler:
        return samples.Sampler(
            self.run, self._whole, self._model, self.choices.inputs, self.dtype, self.device
        )

    @cached_property
    def _layout(self) -> Call:
        return self.call(2)


def _is_model(name: str) -> bool:
    return name.startswith("model.")


def _no_part(part: str, there: set[str] | dict[str, nn.Module]) -> ConfigError:
    return ConfigError(f"part={part}: the model has no such part{closest(part, there)}")
