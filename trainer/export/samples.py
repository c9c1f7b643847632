"""Sample inputs of a model: from the run's data and task, or from a description."""

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
from trainer.data.batches import fetch, to_device
from trainer.errors import ConfigError, PerdureError
from trainer.export.calls import Call, call_of, leaves, replace_tensors
from trainer.protocols import DataSource
from trainer.training import build

_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float64": torch.float64, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
_ITEM = re.compile(r"(\w+):(\w+)\[([\d,]*)\](?:<(\d+))?")
GRAMMAR = "inputs=NAME:DTYPE[SIZES WITHOUT THE BATCH];…, such as inputs='tokens:int64[128]<50257'"
"""Syntax of an input description, for error messages."""


class Sampler:
    """Deterministic calls of a model, with any number of samples.

    Args:
        run: the configuration of the model.
        root: the run's model.
        model: `root`, or the submodule to call.
        description: input description; empty: the inputs that the task passes to the model.
        dtype: dtype of floating-point data; None: unchanged.
        device: device of the model.
    """

    def __init__(
        self,
        run: Run,
        root: nn.Module,
        model: nn.Module,
        description: str,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        self._run, self._root, self._model, self._description = run, root, model, description
        self._dtype, self._device = dtype, device
        self.origin = ""
        self._problem = ""

    def call(self, count: int) -> Call:
        """Return a call with `count` samples, identical on every call.

        Raises:
            ConfigError: the model's inputs cannot be determined.
        """
        with rng.forked(rng.derive("export", self._run.seed)):
            if self._description:
                self.origin = "random values, as described by inputs="
                inputs = random_inputs(self._description, count, self._run.sample.classes)
                return call_of(self._model, (), inputs)
            return self._from_task(count) or self._from_sample_shape(count)

    @cached_property
    def data(self) -> DataSource | None:
        """The run's data source; None if its data is not available."""
        try:
            return build.build_data(self._run)
        except PerdureError as error:
            self._problem = str(error).splitlines()[0].partition(". ")[0]
            return None

    def _from_task(self, count: int) -> Call | None:
        """Return the first call that the task makes of the model for a batch of the data."""
        if self.data is None:
            return None
        dataset: Any = self.data.eval
        is_eval = dataset is not None and len(dataset) > 0
        dataset = dataset if is_eval else self.data.train
        if len(dataset) == 0:
            self._problem = "the data is empty"
            return None
        self.origin = "evaluation data" if is_eval else "training data"
        batch = fetch(dataset, torch.arange(count) % len(dataset), "eval")
        batch = to_device(_cast(batch, self._dtype), self._device)
        task = targets.make(self._run.task, "task")
        phases = getattr(task, "phases", None)
        with _first_call(self._model) as calls, torch.no_grad():
            for extra in [(phase,) for phase in phases] if phases else [()]:
                try:
                    task.loss(self._root, batch, *extra)
                except _Called:
                    return call_of(self._model, *calls[0])
        self._problem = "the task calls only submodules of the model, not the model itself"
        return None

    def _from_sample_shape(self, count: int) -> Call:
        """Return a call with random values of `sample.shape`, floats or else integers."""
        sample = self._run.sample
        floats = torch.randn(count, *sample.shape, dtype=self._dtype, device=self._device)
        integers = torch.randint(sample.classes, (count, *sample.shape), device=self._device)
        problems = []
        for values in (floats, integers):
            try:
                call = call_of(self._model, (values,), {})
                with torch.no_grad():
                    self._model(*call.arguments)
            except (ConfigError, TypeError, ValueError, RuntimeError, IndexError) as error:
                problems.append(str(error).splitlines()[0])
                continue
            self.origin = f"random values ({self._problem})"
            return call
        submodules = ", ".join(name for name, _ in self._model.named_children())
        raise ConfigError(
            f"the inputs of {type(self._model).__name__} are unknown: {self._problem}, and random "
            f"values of sample.shape={list(sample.shape)} raise: {problems[0]}\n"
            f"Describe them with {GRAMMAR}\nOr export a submodule with part=… ({submodules})"
        )


def random_inputs(description: str, count: int, classes: int) -> dict[str, Tensor]:
    """Return random inputs by name, for a description such as `x:float32[1,8,8];m:bool[4]`.

    Floats are standard normal. Integers are below the number after `<`, or below `classes`.

    Raises:
        ConfigError: the description is malformed.
    """
    inputs: dict[str, Tensor] = {}
    for item in description.split(";"):
        match = _ITEM.fullmatch(item.strip())
        if match is None or match[2] not in _DTYPES:
            raise ConfigError(
                f"inputs={description}: {item!r} is not an input description; write {GRAMMAR}, "
                f"with the dtypes {', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[match[2]]
        shape = (count, *(int(size) for size in match[3].split(",") if size))
        if dtype.is_floating_point:
            inputs[match[1]] = torch.randn(shape).to(dtype)
        else:
            high = 2 if dtype is torch.bool else int(match[4] or classes)
            inputs[match[1]] = torch.randint(high, shape).to(dtype)
    return inputs


class _Called(BaseException):  # so that no handler in a task treats it as an error
    """Raised in place of the model's forward pass."""


@contextmanager
def _first_call(
    model: nn.Module,
) -> Iterator[list[tuple[tuple[Any, ...], Mapping[str, Any]]]]:
    """Yield a list that gets the arguments of the model's first call, which raises `_Called`."""
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def record(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((arguments, keywords))
        raise _Called

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _cast(batch: Any, dtype: torch.dtype | None) -> Any:
    tensors = (tensor for _, tensor in leaves(batch))
    cast = (t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in tensors)
    return replace_tensors(batch, cast)
