"""Stream position: the stream's `state_dict` as strict JSON for the cursor."""

from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import values
from trainer.errors import CheckpointError, DataError

_TENSOR = "perdure.tensor"
_SHUFFLE_BUFFER = "BufferShuffledExamplesIterable"
"""Class in `datasets` whose state does not include the samples in its shuffle buffer."""


def capture(source: Any) -> Any | None:
    """Return the state of a stream, or None if it has none that is exact and JSON-compatible."""
    if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
        return None
    if _has_shuffle_buffer(source):
        return None
    try:
        return values.encode(_encode_tensors(source.state_dict()), "the stream's state")
    except CheckpointError:
        return None


def restore(source: Any, state: Any) -> None:
    """Load a captured state into a stream; call it before `iter`.

    Raises:
        DataError: the stream rejects the state.
    """
    try:
        source.load_state_dict(_decode_tensors(values.decode(state)))
    except Exception as error:
        raise DataError(
            f"the stream cannot load its state from the checkpoint: {type(error).__name__}: "
            f"{error}; use the same data and the same code as before"
        ) from error


def _has_shuffle_buffer(source: Any) -> bool:
    parts = [getattr(source, "_ex_iterable", None)]
    while parts:
        part = parts.pop()
        if type(part).__name__ == _SHUFFLE_BUFFER:
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


def _encode_tensors(value: Any) -> Any:
    """Return a copy in which CPU tensors are tuples of dtype, shape and bytes."""
    if isinstance(value, Tensor):
        data = value.detach().flatten().view(torch.uint8).numpy().tobytes()
        return (_TENSOR, str(value.dtype).removeprefix("torch."), list(value.shape), data)
    if type(value) is dict:
        return {key: _encode_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_encode_tensors(item) for item in value)
    return value


def _decode_tensors(value: Any) -> Any:
    if type(value) is tuple and len(value) == 4 and value[0] == _TENSOR:
        _, dtype, shape, data = value
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if data:
            flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            tensor.view(-1).view(torch.uint8).copy_(flat)
        return tensor
    if type(value) is dict:
        return {key: _decode_tensors(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_decode_tensors(item) for item in value)
    return value
