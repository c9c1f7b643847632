"""Measure the time training waits for data: an image folder decoded by 0, 1, 2 … workers.

Makes JPEG pictures, trains a small ResNet on them step by step as trainer/loop.py does, and
measures how much of the time between two steps is spent on waiting for a batch.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from trainer.cluster.world import World
from trainer.config.schema import Run, Sample, Trainer
from trainer.core.state import State
from trainer.tracking.several import Silent
from trainer.training import build
from trainer.training.step import train_step

CLASSES = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--side", type=int, default=256, help="pixels of a picture on the disk")
    parser.add_argument("--crop", type=int, default=64, help="pixels of what the model sees")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1, help="of the training itself")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), options.pictures, options.side)
        for workers in options.workers:
            waiting_s, total_s = measure(folder, workers, options)
            print(
                f"{workers} workers: {waiting_s / total_s:6.1%} of the time is waiting for data; "
                f"{options.steps * options.batch / total_s:,.1f} samples/s, "
                f"{1000 * total_s / options.steps:,.0f} ms a step",
                flush=True,
            )


def draw(folder: Path, count: int, side: int) -> None:
    """Write pictures that are about as hard to decode as photographs."""
    from PIL import Image

    random = np.random.default_rng(0)
    for n in range(count):
        coarse = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth).astype(np.int16) + random.integers(-12, 13, (side, side, 3))
        path = folder / f"class-{n % CLASSES}" / f"{n:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure(folder: str, workers: int, options: argparse.Namespace) -> tuple[float, float]:
    """Return (seconds of waiting for batches, seconds in all) of the steps after a few first."""
    shape = [3, options.crop, options.crop]
    run = Run(
        name="bench",
        run_dir="bench",
        sample=Sample(shape=shape, classes=CLASSES),
        model={"_target_": "models.resnet.resnet18", "input_shape": shape, "classes": CLASSES},
        data={
            "_target_": "trainer.data.image_folder.ImageFolder",
            "dir": folder,
            "shape": shape,
            "eval_share": 0.0,
            "augment": "resized_crop",
            "flip": True,
        },
        task={"_target_": "trainer.task.Classification"},
        optimizer={"_target_": "torch.optim.SGD", "lr": 0.01},
        trainer=Trainer(global_batch_size=options.batch, data_workers=workers),
    )
    job = build.build_job(run, World(), build.build_data(run), Silent())
    batches = job.data.batches(State().cursor)
    waiting_s = began = 0.0
    for step in range(-3, options.steps):
        asked = time.perf_counter()
        if step == 0:
            waiting_s, began = 0.0, asked
        microbatches, _ = next(batches)
        waiting_s += time.perf_counter() - asked
        train_step(job, microbatches)
    return waiting_s, time.perf_counter() - began


if __name__ == "__main__":
    main()
