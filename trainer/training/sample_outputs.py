"""What a trained model shows a person: text, images and figures, written into the run."""

import json
import math
import re
import struct
import traceback
import zlib
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainer.core import rng
from trainer.errors import PerdureError
from trainer.storage import Store
from trainer.training import parallel
from trainer.training.job import Job

FOLDER = "samples"
INDEX = f"{FOLDER}/index.json"
"""Of which step the samples are, and the names of their files."""
_LINES, _COLUMNS = 10, 100
"""Of a text, what is shown on a terminal."""
_TILE = 48
"""Smaller images are enlarged to about so many pixels, so that a person can see them."""
_COLOURS = {1: 0, 3: 2}
"""PNG's colour type, by the number of channels."""


def show(job: Job, step: int, store: Store) -> list[str]:
    """Let the task show what the trained model can do, once for each step. Collective.

    The files are in the run when it returns. The weights are averaged where the run averages;
    nothing that a resume depends on changes. Whatever goes wrong is told and never raised: the run
    is finished and safe by now.

    Args:
        job: after its training.
        step: that the model is at.
        store: the run's.

    Returns:
        Lines for a person: where the samples are, the beginning of each text, or what failed.
    """
    if not hasattr(job.task, "samples"):
        return []
    try:
        if not job.world.from_rank0(lambda: _told(store).get("step") != step):
            return []
        found = job.world.together(partial(_ask, job, step))
        return job.world.from_rank0(lambda: _write(store, step, found))
    except PerdureError as error:
        return [f"  NO SAMPLES: {error}. The run itself is finished and saved."]
    except Exception:
        told = traceback.format_exc().rstrip()
        return [f"  NO SAMPLES; the run itself is finished and saved. What failed:\n{told}"]


def _ask(job: Job, step: int) -> Mapping[str, Any]:
    dataset = job.data.dataset if job.evaluation is None else job.evaluation.dataset
    parallel.take_rank0_buffers(job.model, job.world)
    job.model.eval()
    try:
        averaged = job.ema.in_place() if job.ema is not None else nullcontext()
        own_rng = rng.forked(rng.derive("samples", job.seed, step))  # the same on every rank
        arithmetic = parallel.autocast(job.precision, job.world.device)
        with own_rng, averaged, torch.no_grad(), arithmetic:
            found: Mapping[str, Any] = parallel.inside(
                job.phases[0].wrapped,
                job.model,
                job.task.samples,  # type: ignore[attr-defined]  # a task may have it
                dataset,
            )
            return found
    finally:
        job.model.train()


def _told(store: Store) -> dict[str, Any]:
    """Return the index of the samples that are there."""
    with suppress(FileNotFoundError, ValueError):
        told = json.loads(store.read(INDEX))
        if isinstance(told, dict):
            return told
    return {}


def _write(store: Store, step: int, samples: Mapping[str, Any]) -> list[str]:
    files = dict(_encoded(name, value) for name, value in samples.items())
    older = set(_told(store).get("files", [])) - set(files)
    for name, data in files.items():
        store.replace(f"{FOLDER}/{name}", data)
    store.replace(INDEX, json.dumps({"step": step, "files": sorted(files)}).encode())
    store.delete(f"{FOLDER}/{name}" for name in sorted(older))
    if not files:
        return []
    lines = [f"  samples   {store.url}/{FOLDER}: {', '.join(sorted(files))}"]
    for name, value in samples.items():
        if isinstance(value, str):
            shown = value.splitlines()
            lines += [f"  {name}:", *(f"    | {_plain(line)}" for line in shown[:_LINES])]
            lines += ["    | …"] * (len(shown) > _LINES)
    return lines


def _plain(line: str) -> str:
    """Return a line of a model's text without what would move the cursor or change colours."""
    plain = "".join(c if c.isprintable() else "·" for c in line.expandtabs())
    return plain if len(plain) <= _COLUMNS else plain[: _COLUMNS - 1] + "…"


def _encoded(name: str, value: Any) -> tuple[str, bytes]:
    """Return the file that shows `value`: its name and its bytes.

    Raises:
        TypeError: it is of a kind that nothing shows.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise TypeError(f"a sample is called {name!r}; use letters, digits, _ and -")
    if isinstance(value, str):
        return f"{name}.txt", value.encode()
    if isinstance(value, Tensor):
        return f"{name}.png", png(grid(value) if value.ndim == 4 else value)
    return f"{name}.json", json.dumps(value, allow_nan=False).encode()


def grid(images: Tensor) -> Tensor:
    """Lay images (N, C, H, W) uint8 out in rows, about as many as columns: (C, H', W')."""
    zoom = max(1, _TILE // max(images.shape[2:]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    images = torch.nn.functional.pad(images, (0, 2, 0, 2))  # black between them
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = images.new_zeros(rows * columns, channels, height, width)
    whole[:count] = images
    tiles = whole.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return tiles.reshape(channels, rows * height, columns * width)[:, :-2, :-2]


def png(image: Tensor) -> bytes:
    """Encode an image (C, H, W) uint8, C of 1 or 3. ISO/IEC 15948, filter 0 in every line.

    Raises:
        TypeError: it is of another dtype or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in _COLOURS:
        raise TypeError(
            f"an image is {image.dtype} of shape {list(image.shape)}; give uint8 with 1 or 3 "
            "channels, (C, H, W), or (N, C, H, W) for several"
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
