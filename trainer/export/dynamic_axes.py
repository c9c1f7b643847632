"""The option `dynamic=`: axes of a model's inputs whose sizes may vary."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from trainer.errors import ConfigError, closest

BATCH = "batch"
"""Name of the batch axis."""
_AXIS = re.compile(r"(batch|\d+)(?:=([A-Za-z_]\w*))?")
_GRAMMAR = (
    "write batch, none, axes such as batch,1, or axes of single inputs with their names, such as "
    "'batch;tokens:1=length;mask:1=length'"
)
Axes = dict[str, dict[int, str]]
"""Names of the dynamic axes by input and axis; axes with one name have one size."""


@dataclass(frozen=True)
class DynamicAxes:
    """Dynamic axes as the user described them."""

    text: str = BATCH
    every: Mapping[int, str] = field(default_factory=lambda: {0: BATCH})
    """Names of the axes that are dynamic in every input."""
    single: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Names of the axes of single inputs."""

    @classmethod
    def parse(cls, text: str) -> "DynamicAxes":
        """Parse `none`, or items with `;` between them: `AXES` or `INPUT:AXES`.

        Axes have `,` between them: `batch`, a number, or a number with a name (`1=length`). Axis N
        without one is called `axisN`, and axis 0 `batch`.

        Raises:
            ConfigError: the text is malformed.
        """
        every: dict[int, str] = {}
        single: dict[str, dict[int, str]] = {}
        for item in text.split(";") if text != "none" else ():
            name, colon, axes = item.strip().rpartition(":")
            if bool(colon) != name.isidentifier():
                raise ConfigError(f"dynamic={text}: {_GRAMMAR}")
            names = single.setdefault(name, {}) if colon else every
            for word in axes.split(","):
                match = _AXIS.fullmatch(word.strip())
                if match is None:
                    raise ConfigError(f"dynamic={text}: {_GRAMMAR}")
                axis = 0 if match[1] == BATCH else int(match[1])
                names[axis] = match[2] or (f"axis{axis}" if axis else BATCH)
        return cls(text, every, single)

    @property
    def has_batch(self) -> bool:
        """Return whether the number of samples may vary."""
        return any(BATCH in names.values() for names in (self.every, *self.single.values()))

    def of(self, inputs: Mapping[str, Tensor], count: int) -> Axes:
        """Return the axes of inputs of `count` samples.

        Axis 0, if it is dynamic in every input, is left out where it is not the batch's: where its
        size is not `count`, or, without an input of that size, not the largest.

        Raises:
            ConfigError: an input does not exist or has fewer axes, or axes with one name have
                different sizes.
        """
        for name, names in self.single.items():
            if name not in inputs:
                hint = closest(name, inputs)
                raise ConfigError(f"dynamic={self.text}: the model has no input {name!r}{hint}")
            if (axis := max(names)) >= inputs[name].ndim:
                shape = list(inputs[name].shape)
                raise ConfigError(
                    f"dynamic={self.text}: the shape of {name} is {shape}, so it has no axis {axis}"
                )
        sizes = [len(tensor) for tensor in inputs.values() if tensor.ndim]
        batch_size = count if count in sizes else max(sizes, default=0)
        axes = {
            name: {
                axis: label
                for axis, label in self.every.items()
                if axis < tensor.ndim and (axis or len(tensor) == batch_size)
            }
            | dict(self.single.get(name, {}))
            for name, tensor in inputs.items()
        }
        self._check_sizes(inputs, axes)
        return axes

    def _check_sizes(self, inputs: Mapping[str, Tensor], axes: Axes) -> None:
        first: dict[str, tuple[str, int]] = {}
        for name, names in axes.items():
            for axis, label in names.items():
                other, size = first.setdefault(label, (name, inputs[name].shape[axis]))
                if inputs[name].shape[axis] != size:
                    raise ConfigError(
                        f"dynamic={self.text}: the axis {label!r} of {name} has the size "
                        f"{inputs[name].shape[axis]}, that of {other} has {size}. Give them "
                        f"different names, such as '{BATCH};{other}:{axis}=one;{name}:{axis}=two'"
                    )


def lengths(axes: Axes) -> list[str]:
    """Return the names of all dynamic axes except the batch's."""
    names = dict.fromkeys(label for by_axis in axes.values() for label in by_axis.values())
    return [name for name in names if name != BATCH]


def halved(inputs: Mapping[str, Tensor], axes: Axes, names: Collection[str]) -> dict[str, Tensor]:
    """Return inputs with half the size, at least 1, along the axes with these names."""
    shorter = dict(inputs)
    for name, by_axis in axes.items():
        for axis, label in by_axis.items():
            if label in names:
                size = max(shorter[name].shape[axis] // 2, 1)
                shorter[name] = shorter[name].narrow(axis, 0, size)
    return shorter
