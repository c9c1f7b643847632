"""Our loop against a hand-written one: the same data, order and mathematics, in turn, in one run.

python scripts/bench_loop.py [--rounds 5] [--epochs 4] [--threads 1] [--data DIR]

Prints steps per second of both, their ratio, microseconds added per step, and the time from the
start of the process to the end of the first optimizer step. The final weights of both must be
equal bit for bit, or the comparison means nothing. DIR holds Fashion-MNIST's IDX files (Debian:
dataset-fashion-mnist); both loops read the same bytes.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 128
LR = 0.05
MEAN, STD = 0.2860, 0.3530
WARM_UP_STEPS = 200
LOG_EVERY = 50


def bare(arguments: argparse.Namespace) -> None:
    """The rival: what a person writes without any framework. Imports nothing of ours."""
    import gzip

    import numpy as np
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.data)
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(bytearray(raw), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    raw = gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    labels = torch.from_numpy(np.frombuffer(bytearray(raw), np.uint8, offset=8)).long()
    inputs = torch.from_numpy(images).float().div_(255).sub_(MEAN).div_(STD)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    step, per_epoch = 0, len(labels) // BATCH
    for seed in json.loads(arguments.order_seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        for batch in range(per_epoch):
            chosen = order[batch * BATCH : (batch + 1) * BATCH]
            loss = F.cross_entropy(model(inputs[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 1:
                first = time.time()
            elif step == WARM_UP_STEPS:
                begun = time.time()
            if step == arguments.max_steps:
                break
    ended = time.time()
    result = {"first": first, "weights": _digest(model.state_dict())}
    if step > WARM_UP_STEPS:
        result["steps_per_s"] = (step - WARM_UP_STEPS) / (ended - begun)
    print(json.dumps(result))


def run_bare(arguments: argparse.Namespace, max_steps: int, seeds: list[int]) -> dict:
    """Run the rival in a process of its own."""
    command = [sys.executable, __file__, "--bare", "--data", arguments.data]
    command += ["--threads", str(arguments.threads), "--order-seeds", json.dumps(seeds)]
    began = time.time()
    done = subprocess.run(
        [*command, "--max-steps", str(max_steps)], check=True, capture_output=True, text=True
    )
    result = json.loads(done.stdout)
    return {**result, "start_s": result["first"] - began}


def run_ours(arguments: argparse.Namespace, max_steps: int, folder: str) -> dict:
    """Run `python -m trainer.run` in a process of its own and read its records."""
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    log_every = LOG_EVERY if max_steps > 1 else 1
    settings = [
        "data=mnist", f"data.dir={arguments.data}", f"data.mean={MEAN}", f"data.std={STD}",
        "model=mlp", "optimizer=sgd", f"optimizer.lr={LR}", f"run_dir={run_dir}",
        f"trainer.global_batch_size={BATCH}", f"trainer.max_steps={max_steps}",
        "trainer.max_epochs=null", f"trainer.log_every_steps={log_every}",
        "trainer.eval_every_epochs=null", "checkpoint.every_epochs=null",
        f"launch.threads={arguments.threads}", "tracker.console.every_s=0.001",
    ]  # fmt: skip
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "trainer.run", *settings],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if line["split"] == "train"}
    result = {"start_s": min(times.values()) - began, "weights": _our_weights(run_dir)}
    if max_steps > 1:
        last = max(times)
        result["steps_per_s"] = (last - WARM_UP_STEPS) / (times[last] - times[WARM_UP_STEPS])
    return result


def _our_weights(run_dir: Path) -> str:
    from trainer.export.source import open_source

    return _digest(open_source(str(run_dir), "latest").weights())


def _digest(weights: dict) -> str:
    tensors = [weights[name].numpy().tobytes() for name in sorted(weights)]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def main() -> int:
    """Measure, in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--max-steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--order-seeds", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments)
        return 0
    from trainer.rng import derive

    seeds = [derive("order", 0, epoch) for epoch in range(arguments.epochs)]
    steps = 60_000 // BATCH * arguments.epochs // LOG_EVERY * LOG_EVERY
    rates: dict[str, list[float]] = {"ours": [], "bare": []}
    starts: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            theirs = run_bare(arguments, steps, seeds)
            ours = run_ours(arguments, steps, folder)
            if ours["weights"] != theirs["weights"]:
                print("the final weights differ: not the same mathematics", file=sys.stderr)
                return 1
            rates["ours"].append(ours["steps_per_s"])
            rates["bare"].append(theirs["steps_per_s"])
            starts["bare"].append(run_bare(arguments, 1, seeds)["start_s"])
            starts["ours"].append(run_ours(arguments, 1, folder)["start_s"])
    rate = {name: statistics.median(values) for name, values in rates.items()}
    start = {name: statistics.median(values) for name, values in starts.items()}
    spread = [ours / theirs for ours, theirs in zip(rates["ours"], rates["bare"], strict=True)]
    print(f"final weights equal in all {arguments.rounds} rounds of {steps:,} steps")
    print(f"bare loop        {rate['bare']:8.1f} steps/s")
    print(f"python -m trainer.run {rate['ours']:3.1f} steps/s")
    print(
        f"ratio            {statistics.median(spread):8.3f}  (median of pairs; "
        f"{min(spread):.3f} to {max(spread):.3f})   target >= 0.97"
    )
    print(f"added            {1e6 / rate['ours'] - 1e6 / rate['bare']:8.1f} µs a step")
    print(
        f"first step after {start['ours']:8.2f} s, bare {start['bare']:.2f} s, ratio "
        f"{start['ours'] / start['bare']:.2f}   target <= 1.3"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
