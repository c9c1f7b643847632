"""Sample outputs of a trained model: text, images and tables, written into the run directory."""

import json
import math
import re
import struct
import traceback
import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.core import rng
from trainer.errors import PerdureError
from trainer.storage import Store
from trainer.training import modes, parallel
from trainer.training.job import Job
from trainer.training.messages import row

FOLDER = "samples"
INDEX = f"{FOLDER}/index.json"
"""Index of the samples: their step and file names."""
_LINES, _COLUMNS = 10, 100
"""Maximum lines and columns of a text on the terminal."""
_TILE = 48
"""Size to which smaller images are enlarged, in pixels."""
_COLOURS = {1: 0, 3: 2}
"""PNG colour type by number of channels."""


def show(job: Job, step: int, store: Store) -> list[str]:
    """Write the task's samples into the run, once per step. Collective.

    The files are complete on return. Uses averaged weights if the run has them, and changes
    nothing that a resume depends on. Reports errors instead of raising them: the run is already
    finished and saved.

    Args:
        job: the job, after training.
        step: the model's step.
        store: the run's store.

    Returns:
        Lines for the terminal: the files, the first lines of each text, or an error.
    """
    if not hasattr(job.task, "samples"):
        return []
    try:
        if not job.world.run_on_rank0(lambda: _index(store).get("step") != step):
            return []
        samples = job.world.run_on_all(partial(_samples, job, step))
        return job.world.run_on_rank0(lambda: _write(store, step, samples))
    except PerdureError as error:
        return [f"  warning: no samples: {error}. The run itself is finished and saved."]
    except Exception:
        trace = traceback.format_exc().rstrip()
        return [f"  warning: no samples; the run itself is finished and saved. Error:\n{trace}"]


def _samples(job: Job, step: int) -> Mapping[str, Any]:
    dataset = job.data.dataset if job.evaluation is None else job.evaluation.dataset
    parallel.take_rank0_buffers(job.model, job.world)
    job.model.eval()
    try:
        generators = rng.forked(rng.derive("samples", job.seed, step))  # the same on every rank
        precision = parallel.autocast(job.precision, job.world.device)
        with generators, modes.evaluation_weights(job), torch.no_grad(), precision:
            samples: Mapping[str, Any] = parallel.inside(
                job.phases[0].wrapped,
                job.model,
                job.task.samples,  # type: ignore[attr-defined]  # optional method
                dataset,
            )
            return samples
    finally:
        job.model.train()


def _index(store: Store) -> dict[str, Any]:
    with suppress(FileNotFoundError, ValueError):
        index = json.loads(store.read(INDEX))
        if isinstance(index, dict):
            return index
    return {}


def _write(store: Store, step: int, samples: Mapping[str, Any]) -> list[str]:
    files = dict(_encoded(name, value) for name, value in samples.items())
    outdated = set(_index(store).get("files", [])) - set(files)
    for name, data in files.items():
        store.replace(f"{FOLDER}/{name}", data)
    store.replace(INDEX, json.dumps({"step": step, "files": sorted(files)}).encode())
    store.delete(f"{FOLDER}/{name}" for name in sorted(outdated))
    if not files:
        return []
    output = [row("samples", f"{store.url}/{FOLDER}: {', '.join(sorted(files))}")]
    for name, value in samples.items():
        if isinstance(value, str):
            lines = value.splitlines()
            output += [f"  {name}:", *(f"    | {_printable(line)}" for line in lines[:_LINES])]
            output += ["    | …"] * (len(lines) > _LINES)
    return output


def _printable(line: str) -> str:
    """Return a line without control characters, at most `_COLUMNS` long."""
    text = "".join(c if c.isprintable() else "·" for c in line.expandtabs())
    return text if len(text) <= _COLUMNS else text[: _COLUMNS - 1] + "…"


def _encoded(name: str, value: Any) -> tuple[str, bytes]:
    """Return a sample's file name and bytes: text, PNG for tensors, JSON for anything else.

    Raises:
        TypeError: the name has other characters, or the value has no such encoding.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise TypeError(f"invalid sample name {name!r}; use letters, digits, _ and -")
    if isinstance(value, str):
        return f"{name}.txt", value.encode()
    if isinstance(value, Tensor):
        return f"{name}.png", png(grid(value) if value.ndim == 4 else value)
    return f"{name}.json", json.dumps(value, allow_nan=False).encode()


def grid(images: Tensor) -> Tensor:
    """Arrange images (N, C, H, W), uint8, in a nearly square grid (C, H', W')."""
    zoom = max(1, _TILE // max(images.shape[2:]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    images = torch.nn.functional.pad(images, (0, 2, 0, 2))  # black between them
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = images.new_zeros(rows * columns, channels, height, width)
    padded[:count] = images
    tiles = padded.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiles.reshape(channels, rows * height, columns * width)[:, :-2, :-2]


def png(image: Tensor) -> bytes:
    """Encode an image (C, H, W), uint8, C = 1 or 3, as PNG (ISO/IEC 15948, filter 0).

    Raises:
        TypeError: the image has another dtype or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in _COLOURS:
        raise TypeError(
            f"image with dtype {image.dtype} and shape {list(image.shape)}; use uint8 with 1 or 3 "
            "channels, (C, H, W), or (N, C, H, W) for several images"
        )
    channels, height, width = image.shape
    lines = image.permute(1, 2, 0).reshape(height, width * channels).cpu().numpy()
    pixels = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
