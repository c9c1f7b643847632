"""The copy of a rank's part of the state, laid out exactly as its shard file will be.

What nothing but an optimizer's step changes is copied by a thread, beside the next forward and
backward; a hook on every optimizer waits for that thread just before the next update. All else is
copied at once. The copy can be written while it is still being made.
"""

import threading
import time
import weakref
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainer.checkpoint import shard
from trainer.checkpoint.box import Box
from trainer.checkpoint.memory import HostBuffer, bytes_of, is_plain
from trainer.checkpoint.plan import TORCH_DTYPES, Plan, local
from trainer.errors import CheckpointError

_SLICE_BYTES = 4 << 20
"""A thread that waits for a part of the file gets it when this much more has been copied."""


_Late = tuple[shard.Chunk, str, Tensor, int]
"""Where it goes, its name, what is copied, and its version when the copy began."""


class Snapshot:
    """One copy at a time, in a buffer that outlives it."""

    def __init__(self) -> None:
        self._buffer = HostBuffer(0, pinned=False)
        self._changed = threading.Condition()
        self._copied_bytes = 0  # all before this byte of the file is in place
        self._finished = True
        self._error: BaseException | None = None
        self._restless: set[str] = set()  # names that were found to change before an update
        self._hooked = False
        self.stall_s = 0.0
        """For how long updates waited for copies, all together."""

    def start(self, plan: Plan, tensors: Mapping[str, Tensor], deferrable: Collection[str]) -> None:
        """Copy what may change at any moment, and let a thread copy the rest.

        Call it on the thread that trains, when no other copy is being made or written.
        """
        on_gpu = any(tensors[name].is_cuda for name, _ in plan.sources.values())
        if len(self._buffer) < plan.layout.total_bytes:
            self._buffer = HostBuffer(0, pinned=False)  # give the old one back first
            self._buffer = HostBuffer(plan.layout.total_bytes, pinned=on_gpu)
        self._copied_bytes, self._finished, self._error = plan.layout.header_bytes, False, None
        later = []
        with torch.no_grad():
            for chunk in plan.layout.chunks:
                name, box = plan.sources[chunk.key]
                source = _part(local(tensors[name]), box)
                if name in deferrable and name not in self._restless:
                    later.append((chunk, name, source, source._version))
                else:
                    self._copy(chunk, source)
        stream = torch.cuda.Stream() if on_gpu else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        self._wait_before_updates()
        copying = threading.Thread(
            target=self._copy_late, args=(later, stream), name="checkpoint-snapshot", daemon=True
        )
        copying.start()

    def _wait_before_updates(self) -> None:
        """Have every optimizer wait for a copy that is being made, from now on."""
        if self._hooked:
            return
        self._hooked = True
        snapshot = weakref.ref(self)

        def wait(*_: Any) -> None:
            if (alive := snapshot()) is not None:
                began = None if alive._finished else time.monotonic()
                alive.wait()
                if began is not None:
                    alive.stall_s += time.monotonic() - began

        weakref.finalize(self, register_optimizer_step_pre_hook(wait).remove)

    def _copy_late(self, later: list[_Late], stream: "torch.cuda.Stream | None") -> None:
        try:
            on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
            with torch.no_grad(), on_stream:
                for chunk, _, source, _ in later:
                    self._advance(chunk.start)
                    self._copy(chunk, source, advance=True)
                    if stream is not None:
                        stream.synchronize()
            changed = {name for _, name, source, version in later if source._version != version}
            if changed:
                self._restless |= changed
                raise CheckpointError(
                    f"{', '.join(sorted(changed)[:3])} changed between two updates, while being "
                    "copied; from now on the training waits for the copy of that"
                )
        except BaseException as error:  # whoever waits for the copy gets it
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _copy(self, chunk: shard.Chunk, source: Tensor, *, advance: bool = False) -> None:
        if source.device.type != "cpu" or not is_plain(source):
            place = self._buffer.tensor[chunk.start : chunk.stop]
            place = place.view(TORCH_DTYPES[chunk.dtype]).view(chunk.shape)
            place.copy_(source, non_blocking=advance)
            return
        # plain memcpy: `copy_` would start a second team of OpenMP threads beside the training's
        source_bytes = bytes_of(source)
        for start in range(chunk.start, chunk.stop, _SLICE_BYTES):
            stop = min(start + _SLICE_BYTES, chunk.stop)
            here = source_bytes[start - chunk.start : stop - chunk.start]
            np.copyto(self._buffer.array[start:stop], here)
            if advance:
                self._advance(stop)

    def _advance(self, copied_bytes: int) -> None:
        with self._changed:
            self._copied_bytes = copied_bytes
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until the copy has finished or failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._finished)

    def part(self, start: int, stop: int) -> nullcontext[memoryview]:
        """Return the file's bytes from `start` to `stop`, once they are copied.

        Raises:
            CheckpointError: the copy failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._finished or stop <= self._copied_bytes)
        if self._error is not None:
            raise self._error
        return nullcontext(self._buffer.view[start:stop])

    def check(self) -> None:
        """Wait until the copy has finished.

        Raises:
            CheckpointError: it failed, or a tensor changed while it was copied.
        """
        self.wait()
        if self._error is not None:
            raise self._error


def _part(tensor: Tensor, box: Box) -> Tensor:
    for axis, (offset, length) in enumerate(zip(box.offsets, box.lengths, strict=True)):
        if length != tensor.shape[axis]:
            tensor = tensor.narrow(axis, offset, length)
    return tensor
