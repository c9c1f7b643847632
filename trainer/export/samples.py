"""Samples to call a model with: what the run's task hands it, or what a person describes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import targets
from trainer.config.schema import Run
from trainer.core import rng
from trainer.data.source import fetch, to_device
from trainer.errors import ConfigError, PerdureError
from trainer.export.calls import Call, call_of, exchanged, leaves
from trainer.protocols import DataSource
from trainer.training import build

_KINDS = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float64": torch.float64, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
_ITEM = re.compile(r"(\w+):(\w+)\[([\d,]*)\](?:<(\d+))?")
GRAMMAR = "inputs=NAME:DTYPE[SIZES WITHOUT THE BATCH];…, such as inputs='tokens:int64[128]<50257'"
"""How a person describes inputs."""


class Sampler:
    """Makes calls of a model with any number of samples.

    Args:
        run: the configuration that the model is from.
        whole: the run's model.
        model: it, or the part of it that is called.
        described: what a person says that it takes; empty: the task shows it.
        dtype: of floating-point data; None: as it is.
        device: where the model is.
    """

    def __init__(
        self,
        run: Run,
        whole: nn.Module,
        model: nn.Module,
        described: str,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self._run, self._whole, self._model, self._described = run, whole, model, described
        self._dtype, self._device = dtype, device
        self.origin = ""
        self._why_not = ""

    def call(self, count: int) -> Call:
        """Return a call with `count` samples, the same ones each time.

        Raises:
            ConfigError: nothing is known that the model takes.
        """
        with rng.forked(rng.derive("export", self._run.seed)):
            if self._described:
                self.origin = "random values, as inputs= describes them"
                given = described(self._described, count, self._run.sample.classes)
                return call_of(self._model, (), given)
            found = self._shown(count)
            return found if found is not None else self._guessed(count)

    @cached_property
    def data(self) -> DataSource | None:
        """The run's data, None where it is not here."""
        try:
            return build.build_data(self._run)
        except PerdureError as error:
            self._why_not = str(error).splitlines()[0].partition(". ")[0]
            return None

    def _shown(self, count: int) -> Call | None:
        """Return the first call that the task makes of the model for a batch of the data."""
        if self.data is None:
            return None
        dataset: Any = self.data.eval
        is_eval = dataset is not None and len(dataset) > 0
        dataset = dataset if is_eval else self.data.train
        if len(dataset) == 0:
            self._why_not = "the data is empty"
            return None
        self.origin = "evaluation data" if is_eval else "training data"
        batch = fetch(dataset, torch.arange(count) % len(dataset), "eval")
        batch = to_device(_cast(batch, self._dtype), self._device)
        task = targets.make(self._run.task, "task")
        phases = getattr(task, "phases", None)
        with watched(self._model) as seen, torch.no_grad():
            for extra in [(phase,) for phase in phases] if phases else [()]:
                try:
                    task.loss(self._whole, batch, *extra)
                except _Seen:
                    return call_of(self._model, *seen[0])
        self._why_not = "the task calls only parts of the model, not the model itself"
        return None

    def _guessed(self, count: int) -> Call:
        """Return a call with random values of the sample's shape that the model can answer."""
        sample = self._run.sample
        noise = torch.randn(count, *sample.shape, dtype=self._dtype, device=self._device)
        numbers = torch.randint(sample.classes, (count, *sample.shape), device=self._device)
        problems = []
        for values in (noise, numbers):
            try:
                found = call_of(self._model, (values,), {})
                with torch.no_grad():
                    self._model(*found.arguments)
            except (ConfigError, TypeError, ValueError, RuntimeError, IndexError) as error:
                problems.append(str(error).splitlines()[0])
                continue
            self.origin = f"random values ({self._why_not})"
            return found
        parts = ", ".join(name for name, _ in self._model.named_children())
        raise ConfigError(
            f"nothing is known that {type(self._model).__name__} takes: {self._why_not}, and with "
            f"random values of sample.shape={list(sample.shape)} it says: {problems[0]}\n"
            f"Say what it takes: {GRAMMAR}\nOr export a part of it: part=… (it has {parts})"
        )


def described(text: str, count: int, classes: int) -> dict[str, Tensor]:
    """Return random inputs by name, of a description such as `x:float32[1,8,8];m:bool[4]`.

    Floats are standard normal. Integers lie below what follows `<`, or below `classes`.

    Raises:
        ConfigError: the text is not such a description.
    """
    found: dict[str, Tensor] = {}
    for item in text.split(";"):
        match = _ITEM.fullmatch(item.strip())
        if match is None or match[2] not in _KINDS:
            raise ConfigError(
                f"inputs={text}: {item!r} is no description of an input; write {GRAMMAR}, with "
                f"the dtypes {', '.join(_KINDS)}"
            )
        dtype = _KINDS[match[2]]
        shape = (count, *(int(size) for size in match[3].split(",") if size))
        if dtype.is_floating_point:
            found[match[1]] = torch.randn(shape).to(dtype)
        else:
            high = 2 if dtype is torch.bool else int(match[4] or classes)
            found[match[1]] = torch.randint(high, shape).to(dtype)
    return found


class _Seen(BaseException):  # so that no handler of a task takes it for an error
    """The model was called."""


@contextmanager
def watched(model: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], Mapping[str, Any]]]]:
    """Keep the arguments of the model's first call, which ends with `_Seen` before it is made."""
    seen: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def look(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments, keywords))
        raise _Seen

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _cast(batch: Any, dtype: torch.dtype | None) -> Any:
    tensors = (tensor for _, tensor in leaves(batch))
    cast = (t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in tensors)
    return exchanged(batch, cast)
