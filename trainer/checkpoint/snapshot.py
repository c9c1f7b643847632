"""Copy of a rank's part of the state, in the layout of its shard file.

Tensors that only `Optimizer.step` changes are copied by a thread during the next forward and
backward. A hook on every optimizer waits for that thread before the next update. All other
tensors are copied immediately. The copy can be written while it is still in progress.
"""

import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trainer.checkpoint import shard
from trainer.checkpoint.memory import HostBuffer, as_bits, bytes_of, is_plain
from trainer.checkpoint.plan import Plan, held_part
from trainer.errors import CheckpointError

_SLICE_BYTES = 4 << 20
"""Granularity at which copied bytes become available to the writing threads."""


_Deferred = tuple[shard.Chunk, str, Tensor, int]
"""Destination, name, source, and the source's version when the copy started."""


def call_before_updates(owner: object, method: Callable[[], None]) -> None:
    """Call a method of `owner` before every update of every optimizer, while `owner` exists."""
    reference = weakref.WeakMethod(method)

    def hook(*_: Any) -> None:
        if (call := reference()) is not None:
            call()

    weakref.finalize(owner, register_optimizer_step_pre_hook(hook).remove)


class Snapshot:
    """Copies the state, one copy at a time, into a buffer that is reused."""

    def __init__(self) -> None:
        self._buffer = HostBuffer(0, pinned=False)
        self._changed = threading.Condition()
        self._copied_bytes = 0  # bytes of the file, from its start, that are copied
        self._finished = True
        self._error: BaseException | None = None
        self._unstable: set[str] = set()  # tensors that changed before an update
        self._hooked = False
        self.stall_s = 0.0
        """Total time that optimizer updates waited for copies."""

    def start(self, plan: Plan, tensors: Mapping[str, Tensor], deferrable: Collection[str]) -> None:
        """Copy the tensors that may change at any time, and start a thread for the others.

        Training thread only, while no other copy is in progress or being written.

        Args:
            plan: this rank's part of the checkpoint.
            tensors: all tensors of the state, by name.
            deferrable: names of tensors that only `Optimizer.step` changes.
        """
        on_gpu = any(tensors[name].is_cuda for name, _ in plan.sources.values())
        if len(self._buffer) < plan.layout.total_bytes:
            self._buffer = HostBuffer(0, pinned=False)  # free the old one first
            self._buffer = HostBuffer(plan.layout.total_bytes, pinned=on_gpu)
        self._copied_bytes, self._finished, self._error = plan.layout.header_bytes, False, None
        deferred = []
        with torch.no_grad():
            for chunk in plan.layout.chunks:
                if chunk.key == shard.PADDING:
                    self._buffer.array[chunk.start : chunk.stop] = 0
                    continue
                name, box = plan.sources[chunk.key]
                source = held_part(tensors[name], box)
                if name in deferrable and name not in self._unstable:
                    deferred.append((chunk, name, source, source._version))
                else:
                    self._copy(chunk, source)
        stream = torch.cuda.Stream() if on_gpu else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        self._wait_before_updates()
        copying = threading.Thread(
            target=self._copy_deferred,
            args=(deferred, stream),
            name="checkpoint-snapshot",
            daemon=True,
        )
        copying.start()

    def _wait_before_updates(self) -> None:
        """Make every optimizer wait for a copy in progress before it updates."""
        if self._hooked:
            return
        self._hooked = True
        call_before_updates(self, self._stall)

    def _stall(self) -> None:
        began = None if self._finished else time.monotonic()
        self.wait()
        if began is not None:
            self.stall_s += time.monotonic() - began

    def _copy_deferred(self, deferred: list[_Deferred], stream: "torch.cuda.Stream | None") -> None:
        try:
            on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
            with torch.no_grad(), on_stream:
                for chunk, _, source, _ in deferred:
                    self._advance(chunk.start)
                    self._copy(chunk, source, advance=True)
                    if stream is not None:
                        stream.synchronize()
            changed = {name for _, name, source, version in deferred if source._version != version}
            if changed:
                self._unstable |= changed
                raise CheckpointError(
                    f"{', '.join(sorted(changed)[:3])} changed between two updates, during the "
                    "copy. Training will wait for the copy of these tensors from now on"
                )
        except BaseException as error:  # raised by `part` and `check`
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def _copy(self, chunk: shard.Chunk, source: Tensor, *, advance: bool = False) -> None:
        if source.device.type != "cpu" or not is_plain(source):
            bits = as_bits(source)
            target = self._buffer.tensor[chunk.start : chunk.stop].view(bits.dtype)
            target.view(bits.shape).copy_(bits, non_blocking=advance)
            return
        # plain memcpy: `copy_` would start a second OpenMP team, which slows the training's
        source_bytes = bytes_of(source)
        for start in range(chunk.start, chunk.stop, _SLICE_BYTES):
            stop = min(start + _SLICE_BYTES, chunk.stop)
            data = source_bytes[start - chunk.start : stop - chunk.start]
            np.copyto(self._buffer.array[start:stop], data)
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

    def part(self, start: int, stop: int) -> memoryview:
        """Return the file's bytes from `start` to `stop`, once they are copied.

        Raises:
            CheckpointError: the copy failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._finished or stop <= self._copied_bytes)
        if self._error is not None:
            raise self._error
        return self._buffer.view[start:stop]

    def close(self) -> None:
        """Nothing to do: the next copy uses the buffer again."""

    def check(self) -> None:
        """Wait until the copy has finished.

        Raises:
            CheckpointError: it failed, or a tensor changed while it was copied.
        """
        self.wait()
        if self._error is not None:
            raise self._error
