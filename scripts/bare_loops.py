"""Baselines of scripts/bench_loop.py: hand-written training loops without a framework.

python scripts/bare_loops.py '{"case": "mlp", …}'; cnn_ddp under torchrun, once for each rank.

Nothing of `trainer` is imported; cnn_ddp and gpt train the classes of `models`, which are plain
modules. Prints one line of JSON: when the first step ended, steps per second after the warm-up,
and a digest of the final weights.
"""

import gzip
import hashlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

MEAN, STD = 0.2860, 0.3530


def digest(weights: dict) -> str:
    """Return one number for all names and bytes of a state dict."""
    parts = [name.encode() + weights[name].numpy().tobytes() for name in sorted(weights)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Clock:
    """Takes the time at the first step, at the end of the warm-up, and at the last step."""

    def __init__(self, settings: dict) -> None:
        self._steps, self._warm_up_steps = settings["steps"], settings["warm_up_steps"]
        self._step = 0

    def is_last(self) -> bool:
        """Count a step; return whether it was the last one."""
        self._step += 1
        if self._step == 1:
            self._first = time.time()
        if self._step == self._warm_up_steps:
            self._begun = time.time()
        return self._step == self._steps

    def show(self, weights: dict) -> None:
        """Print what was measured."""
        ended = time.time()
        result = {"first": self._first, "weights": digest(weights)}
        if self._step > self._warm_up_steps:
            result["steps_per_s"] = (self._step - self._warm_up_steps) / (ended - self._begun)
        print(json.dumps(result))


def fashion(folder: str):
    """Return images (60000, 1, 28, 28) float32, standardised, and labels (60000,) int64."""
    import numpy as np
    import torch

    raw = gzip.decompress(Path(folder, "train-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(bytearray(raw), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    raw = gzip.decompress(Path(folder, "train-labels-idx1-ubyte.gz").read_bytes())
    labels = torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8, offset=8)).long()
    return torch.from_numpy(images).float().div_(255).sub_(MEAN).div_(STD), labels


def orders(settings: dict, size: int):
    """Yield the samples of each global batch, epoch by epoch."""
    import torch

    batch = settings["batch"]
    for seed in settings["order_seeds"]:
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        for start in range(0, size - batch + 1, batch):
            yield order[start : start + batch]


def mlp(settings: dict) -> None:
    """Train a multi-layer perceptron in one process."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    inputs, labels = fashion(settings["data"])
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)
    clock = Clock(settings)
    for indices in orders(settings, len(labels)):
        loss = F.cross_entropy(model(inputs[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if clock.is_last():
            break
    clock.show(model.state_dict())


def cnn_ddp(settings: dict) -> None:
    """Train a convolutional net, batches cut over the ranks that torchrun started."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    from models.cnn import CNN

    dist.init_process_group("gloo")
    rank, local_batch = dist.get_rank(), settings["batch"] // dist.get_world_size()
    inputs, labels = fashion(settings["data"])
    torch.manual_seed(0)
    model = CNN()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)
    torch.manual_seed(settings["rank_seeds"][rank])  # each rank drops out its own units
    clock = Clock(settings)
    for global_indices in orders(settings, len(labels)):
        indices = global_indices[rank * local_batch : (rank + 1) * local_batch]
        loss = F.cross_entropy(wrapped(inputs[indices]), labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if clock.is_last():
            break
    if rank == 0:
        clock.show(model.state_dict())
    dist.destroy_process_group()


def gpt(settings: dict) -> None:
    """Train a GPT of 6 layers on bytes, gradients of four microbatches added up."""
    import numpy as np
    import torch
    from torch.nn import functional as F
    from torch.nn.utils import clip_grad_norm_

    from models.gpt import GPT

    context, pieces = settings["context"], settings["accumulate"]
    files = sorted(Path(settings["text"]).glob("train-*.bin"))
    tokens = np.concatenate([np.fromfile(file, dtype="<u2") for file in files])
    windows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[::context]
    torch.manual_seed(0)
    model = GPT(257, context, layers=6, heads=6, width=384)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0.01)
    clock = Clock(settings)
    for indices in orders(settings, len(windows)):
        for piece in indices.chunk(pieces):
            window = torch.from_numpy(windows[piece.numpy()].astype(np.int64))
            logits = model(window[:, :-1])
            targets = window[:, 1:].flatten()
            (F.cross_entropy(logits.flatten(0, 1), targets) / pieces).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if clock.is_last():
            break
    clock.show(model.state_dict())


def main() -> None:
    settings = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(settings["threads"])
    {"mlp": mlp, "cnn_ddp": cnn_ddp, "gpt": gpt}[settings["case"]](settings)


if __name__ == "__main__":
    main()
