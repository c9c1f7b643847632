"""torch.distributed.checkpoint with Perdure's storage and its own, alternately, in one process.

    python scripts/bench_dcp.py [--gigabytes 1.0] [--rounds 5]

The state resembles GPT-2: tensors of many sizes and AdamW's two moments. Both saves are durable on
return (torch's through sync_files, its default). Prints medians and the ratios of all rounds.
"""

import argparse
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from trainer.checkpoint.dcp import PerdureStorageReader, PerdureStorageWriter

WIDTH = 768


def state_of(nbytes: int) -> dict[str, Any]:
    """Return transformer blocks and their AdamW moments, `nbytes` bytes or slightly less."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH)}
    shapes |= {"down": (WIDTH, 4 * WIDTH), "norm": (WIDTH,), "bias": (4 * WIDTH,)}
    block = 4 * 3 * sum(torch.Size(shape).numel() for shape in shapes.values())
    state: dict[str, Any] = {}
    for number in range(max(nbytes // block, 1)):
        for kind in ("model", "exp_avg", "exp_avg_sq"):
            state |= {f"{kind}.{number}.{name}": torch.randn(s) for name, s in shapes.items()}
    return state


def timed(do: Callable[[], object]) -> float:
    began = time.monotonic()
    do()
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", default=None, help="folder for the checkpoints; default: a temporary folder"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    state = state_of(int(arguments.gigabytes * 1e9))
    nbytes = sum(tensor.nbytes for tensor in state.values())
    kinds = {
        "perdure": (PerdureStorageWriter, PerdureStorageReader),
        "torch": (dcp.FileSystemWriter, dcp.FileSystemReader),
    }
    durations: dict[str, list[float]] = {
        f"{verb} {kind}": [] for verb in ("save", "load") for kind in kinds
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number in range(arguments.rounds + 1):
            for kind, (writer, reader) in kinds.items():
                path = Path(folder, kind)
                shutil.rmtree(path, ignore_errors=True)
                save_s = timed(lambda: dcp.save(state, storage_writer=writer(path)))  # noqa: B023
                load_s = timed(lambda: dcp.load(state, storage_reader=reader(path)))  # noqa: B023
                if number:  # the first round warms up
                    durations[f"save {kind}"].append(save_s)
                    durations[f"load {kind}"].append(load_s)
    print(f"{nbytes / 1e9:.2f} GB in {len(state)} tensors, {arguments.rounds} rounds")
    for name, seconds in durations.items():
        print(f"{name:<14} {nbytes / 1e9 / statistics.median(seconds):.2f} GB/s")
    for verb in ("save", "load"):
        pairs = zip(durations[f"{verb} torch"], durations[f"{verb} perdure"], strict=True)
        ratios = sorted(reference / perdure for reference, perdure in pairs)
        middle = statistics.median(ratios)
        print(f"{verb}: {middle:.2f} times torch's ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
