"""FLOPs of a training step, and the peak FLOPs of GPUs."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core import rng
from trainer.data.batches import to_device
from trainer.protocols import Batch

_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"B200", {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75}),
    (r"(H100|H200) NVL", {"bf16": 835, "fp16": 835, "tf32": 417.5, "fp32": 60}),
    (r"H100 PCIe", {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51}),
    (r"H100|H200|GH200", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 67}),
    (r"A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    (r"A40", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"A30", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    (r"A10", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    (r"L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    (r"L40", {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5}),
    (r"L4", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    (r"T4", {"fp16": 65, "fp32": 8.1}),
    (r"V100S", {"fp16": 130, "fp32": 16.4}),
    (r"V100 PCIe", {"fp16": 112, "fp32": 14}),
    (r"V100", {"fp16": 125, "fp32": 15.7}),
    (r"RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"RTX 3090", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
)
"""Dense TFLOP/s by name and arithmetic, fp32 without tensor cores, half precision summed in fp32.

Sources: NVIDIA's data sheets, their sparse rates halved: HGX B200 (2024), H100 (2023), H200
(2024), A100, A40, A30, A10 (2021), L40S, L40, L4 (2023), T4 (2018), V100 (2020); and the white
papers of Ada (v2.1, 2023) and GA102 (v2.1, 2021).
"""
_SUFFIX = r"( |-|$)(SXM\d?|PCIE?|\d+ ?GB|HBM\w*|NVL|FHHL|[ -])*$"
"""Suffixes for variants of the same chip; excludes `Laptop GPU`, `MIG 1g.5gb` and `D`."""


def peak_flops_per_s(name: str, arithmetic: str) -> float | None:
    """Return the peak FLOPs per second of a device, or None if it is unknown.

    Args:
        name: from torch.cuda.get_device_name.
        arithmetic: `fp32`, `tf32`, `bf16` or `fp16`.
    """
    chip = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    chip = re.sub(r"^(\w+)-(?=PCIE)", r"\1 ", chip, flags=re.IGNORECASE)
    for pattern, peaks in _PEAKS:
        if re.match(f"(?:{pattern}){_SUFFIX}", chip, re.IGNORECASE):
            return peaks[arithmetic] * 1e12 if arithmetic in peaks else None
    return None


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def count(twin: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> int:
    """Return the FLOPs of matrix products, convolutions and attention, forward and backward.

    A multiplication and an addition are two. Nothing is computed, and no random generator advances.
    Activations recomputed in the backward pass do not count.

    Args:
        twin: a copy of the plain model on the meta device.
        loss: returns the loss of the model on a batch.
        batch: a microbatch, on any device.

    Raises:
        Exception: any error of the model or the loss for tensors without data.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with rng.forked(0), FlopCounterMode(display=False) as counter:
        value = loss(twin, to_device(batch, torch.device("meta")))
        if value.requires_grad:
            value.backward()
    return int(counter.get_total_flops())


class StepFlops:
    """Model FLOPs of a training step, counted on a copy of the model without data.

    Create it before the model is compiled or sharded. Third-party code may fail on tensors without
    data; `total` then stays None and `problem` has the reason.

    Args:
        model: the plain module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.total: int | None = None
        """FLOPs of one step on this rank."""
        self.problem = ""
        self._twin: nn.Module | None = None
        try:
            self._twin = on_meta(model)
        except Exception as error:
            self._fail(error)

    def count(
        self,
        losses: Iterable[tuple[Callable[[nn.Module, Batch], Tensor], Collection[str]]],
        first: Callable[[], Sequence[Batch]],
    ) -> None:
        """Count one step.

        Args:
            losses: the loss of each phase, and the names of the parameters that it trains.
            first: returns the microbatches of the first step.
        """
        if self._twin is None:
            return
        try:
            microbatches, total = first(), 0
            for loss, trained in losses:
                for name, parameter in self._twin.named_parameters():
                    parameter.requires_grad_(name in trained)
                total += count(self._twin, loss, microbatches[0])
            self.total = total * len(microbatches)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        text = str(error).partition("\n")[0][:200]
        self.problem = f"warning: no MFU, cannot count model FLOPs: {type(error).__name__}: {text}"
