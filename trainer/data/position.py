"""Where a stream is: its own `state_dict`, as strict JSON that a cursor can carry."""

from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import values
from trainer.errors import CheckpointError, DataError

_TENSOR = "perdure.tensor"
_NOT_EXACT = "BufferShuffledExamplesIterable"
"""A stream of `datasets` with a shuffle buffer: its state leaves out what is in the buffer."""


def of(source: Any) -> Any | None:
    """Return the state of a stream, if it has one that is exact and made of plain values."""
    if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
        return None
    if _has_shuffle_buffer(source):
        return None
    try:
        return values.encode(_without_tensors(source.state_dict()), "the stream's state")
    except CheckpointError:
        return None


def restore(source: Any, state: Any) -> None:
    """Give back to a stream what `of` returned; call it before `iter`.

    Raises:
        DataError: the stream does not take it.
    """
    try:
        source.load_state_dict(_with_tensors(values.decode(state)))
    except Exception as error:
        raise DataError(
            f"the stream cannot go on from the state that it gave before: {type(error).__name__}: "
            f"{error}; is it made of the same data in the same way?"
        ) from error


def _has_shuffle_buffer(source: Any) -> bool:
    parts = [getattr(source, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if type(part).__name__ == _NOT_EXACT:
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


def _without_tensors(value: Any) -> Any:
    """Return a copy in which tensors on the CPU are bytes."""
    if isinstance(value, Tensor):
        data = value.detach().flatten().view(torch.uint8).numpy().tobytes()
        return (_TENSOR, str(value.dtype).removeprefix("torch."), list(value.shape), data)
    if type(value) is dict:
        return {key: _without_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(item) for item in value)
    return value


def _with_tensors(value: Any) -> Any:
    if type(value) is tuple and len(value) == 4 and value[0] == _TENSOR:
        _, dtype, shape, data = value
        empty = torch.empty(shape, dtype=getattr(torch, dtype))
        if data:
            empty.view(-1).view(torch.uint8).copy_(
                torch.frombuffer(bytearray(data), dtype=torch.uint8)
            )
        return empty
    if type(value) is dict:
        return {key: _with_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(item) for item in value)
    return value
