"""The state that checkpoint benchmarks save, and the limits of the disk that they save to."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import checkpoint
from trainer.checkpoint import state_tree
from trainer.checkpoint.memory import HostBuffer
from trainer.core.threads import in_parallel
from trainer.storage import LocalStore
from trainer.storage.store import in_pieces


def gpt2_small_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the 148 parameters of GPT-2 small (Radford et al. 2019)."""
    width = 768
    yield from [("wte", (50257, width)), ("wpe", (1024, width))]
    for layer in range(12):
        for name, shape in {
            "ln_1_weight": (width,), "ln_1_bias": (width,),
            "attn_c_attn_weight": (width, 3 * width), "attn_c_attn_bias": (3 * width,),
            "attn_c_proj_weight": (width, width), "attn_c_proj_bias": (width,),
            "ln_2_weight": (width,), "ln_2_bias": (width,),
            "mlp_c_fc_weight": (width, 4 * width), "mlp_c_fc_bias": (4 * width,),
            "mlp_c_proj_weight": (4 * width, width), "mlp_c_proj_bias": (width,),
        }.items():  # fmt: skip
            yield f"h_{layer}_{name}", shape
    yield from [("ln_f_weight", (width,)), ("ln_f_bias", (width,))]


class Job:
    """A model and an optimizer with state, and a synthetic training step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ParameterDict(
            {name: nn.Parameter(torch.randn(shape) * 0.02) for name, shape in gpt2_small_shapes()}
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        for parameter in self.model.values():
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        self.square = torch.randn(700, 700)

    def content(self) -> checkpoint.Content:
        """Return the content of a Perdure checkpoint: model and optimizer state."""
        content = checkpoint.Content(objects={"run": {"step": 1}})
        state_tree.add_model(content, self.model, with_buffers=True)
        state_tree.add_optimizers(content, self.model, [self.optimizer])
        return content

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the other libraries: nested dicts of the same tensors."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, flat."""
        return self.content().tensors

    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def compute(self, seconds: float) -> None:
        """Emulate a forward and backward pass: matrix products on one core for `seconds`."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            torch.mm(self.square, self.square)


def drop_caches(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def fio(folder: Path, nbytes: int, direction: str, *, direct: bool) -> float:
    """Return the seconds fio needs to transfer `nbytes`."""
    file = folder / "fio"
    command = [
        "fio", "--name=raw", f"--filename={file}", f"--size={nbytes // 4096 * 4096}",
        f"--rw={direction}", "--bs=4m", "--iodepth=8", "--ioengine=libaio",
        f"--direct={int(direct)}", "--end_fsync=1", "--output-format=json",
    ]  # fmt: skip
    if direction == "write":
        file.unlink(missing_ok=True)
    done = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return float(nbytes / done["jobs"][0][direction]["bw_bytes"])


def store_alone(folder: Path, buffer: HostBuffer, direction: str) -> float:
    """Return the seconds of bare store calls for the bytes of `buffer`: a tighter limit than fio.

    Huge pages, eight threads, nothing copied and nothing checked.
    """
    store, part_bytes = LocalStore(folder), 4 << 20
    starts = range(0, len(buffer), part_bytes)
    began = time.perf_counter()
    if direction == "write":
        (folder / "alone").unlink(missing_ok=True)
        store.write("alone", len(buffer), in_pieces(buffer.view, part_bytes))
    else:
        in_parallel(
            lambda at: store.read_into("alone", at, buffer.view[at : at + part_bytes]), starts, 8
        )
    return time.perf_counter() - began
