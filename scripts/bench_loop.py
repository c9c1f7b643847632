"""Our loop against hand-written ones: the same data, order and mathematics, in turn, in one run.

python scripts/bench_loop.py [--case mlp|cnn_ddp|gpt] [--rounds 5] [--steps N] [--threads 1]
                             [--data DIR]

Prints steps per second of both, their ratio and microseconds added per step; for mlp also the time
from the start of the process to the end of the first optimizer step. The final weights of both must
be equal bit for bit, or the comparison means nothing. DIR holds Fashion-MNIST's IDX files (Debian:
dataset-fashion-mnist); the text is the source of Python's library. Both loops read the same bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bare_loops import MEAN, STD, digest

RIVAL = Path(__file__).with_name("bare_loops.py")


@dataclass(frozen=True)
class Case:
    """Benchmark case: the job, its number of steps, and the target ratio to the bare loop."""

    name: str
    settings: tuple[str, ...]
    target: float
    steps: int
    warm_up_steps: int
    log_every: int
    """Divides `steps` and `warm_up_steps`: our times are those of the lines in metrics.jsonl."""
    batch: int
    lr: float
    ranks: int = 1
    accumulate: int = 1
    context: int = 128
    times_start: bool = False


CASES = {
    case.name: case
    for case in (
        Case("mlp", ("data=mnist", "model=mlp", "optimizer=sgd"), 0.97, steps=1850,
             warm_up_steps=200, log_every=50, batch=128, lr=0.05, times_start=True),
        Case("cnn_ddp", ("data=mnist", "model=cnn", "optimizer=sgd"), 0.98, steps=150,
             warm_up_steps=25, log_every=25, batch=128, lr=0.05, ranks=2),
        Case("gpt", ("data=text", "task=language_model", "model=gpt", "optimizer=adamw",
                     "sample.shape=[128]", "trainer.clip_norm=1.0"), 0.99, steps=25,
             warm_up_steps=5, log_every=5, batch=8, lr=0.001, accumulate=4),
    )
}  # fmt: skip


def run_bare(case: Case, arguments: argparse.Namespace) -> dict:
    """Run the baseline in separate processes."""
    from trainer.core.rng import derive

    settings = {
        "case": case.name, "steps": case.steps, "warm_up_steps": case.warm_up_steps,
        "batch": case.batch, "lr": case.lr, "accumulate": case.accumulate,
        "context": case.context, "threads": arguments.threads, "data": arguments.data,
        "text": arguments.text, "order_seeds": [derive("order", 0, n) for n in range(4)],
        "rank_seeds": [derive("rank", 0, 0, rank) for rank in range(case.ranks)],
    }  # fmt: skip
    launcher = [] if case.ranks == 1 else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"
    ]  # fmt: skip
    began = time.time()
    done = subprocess.run(
        [sys.executable, *launcher, str(RIVAL), json.dumps(settings)],
        check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
    )  # fmt: skip
    result = json.loads(done.stdout)
    return {**result, "start_s": result["first"] - began}


def run_perdure(case: Case, arguments: argparse.Namespace, folder: str) -> dict:
    """Run `python -m trainer.run` in separate processes and read its records."""
    run_dir = Path(tempfile.mkdtemp(dir=folder)) / "run"
    data_settings = [f"data.dir={arguments.text}"] if case.name == "gpt" else [
        f"data.dir={arguments.data}", f"data.mean={MEAN}", f"data.std={STD}"
    ]  # fmt: skip
    settings = [
        *case.settings, *data_settings, f"optimizer.lr={case.lr}", f"run_dir={run_dir}",
        f"trainer.global_batch_size={case.batch}", f"trainer.accumulate={case.accumulate}",
        f"trainer.max_steps={case.steps}", "trainer.max_epochs=null",
        f"trainer.log_every_steps={min(case.log_every, case.steps)}",
        "trainer.eval_every_epochs=null", "checkpoint.every_epochs=null",
        f"launch.nproc={case.ranks}", f"launch.threads={arguments.threads}",
        "tracker.console.every_s=0.001",
    ]  # fmt: skip
    began = time.time()
    subprocess.run(
        [sys.executable, "-m", "trainer.run", *settings],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if line["split"] == "train"}
    result = {"start_s": min(times.values()) - began, "weights": _our_weights(run_dir)}
    if case.steps > case.warm_up_steps:
        counted = case.steps - case.warm_up_steps
        result["steps_per_s"] = counted / (times[case.steps] - times[case.warm_up_steps])
    return result


def _our_weights(run_dir: Path) -> str:
    from trainer.export.loaded_checkpoint import open_checkpoint

    return digest(open_checkpoint(str(run_dir), "latest").weights())


def prepare_text(folder: str) -> None:
    """Cut the source of Python's library into tokens, once for both."""
    subprocess.run(
        [sys.executable, "-m", "trainer.prepare", "data=text", f"data.dir={folder}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def measure(case: Case, arguments: argparse.Namespace, folder: str) -> bool:
    """Measure in turn, and print; return whether the final weights were equal each time."""
    pairs, starts = [], []
    began = time.time()
    for number in range(arguments.rounds):
        bare, perdure = run_bare(case, arguments), run_perdure(case, arguments, folder)
        if perdure["weights"] != bare["weights"]:
            print(f"{case.name}: the final weights differ: not the same mathematics")
            return False
        pairs.append((perdure["steps_per_s"], bare["steps_per_s"]))
        print(f"  round {number + 1}  {pairs[-1][0] / pairs[-1][1]:.3f}", file=sys.stderr)
        if case.times_start:
            one = replace(case, steps=1)
            starts.append(
                (
                    run_perdure(one, arguments, folder)["start_s"],
                    run_bare(one, arguments)["start_s"],
                )
            )
    rate, bare_rate = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = [perdure / baseline for perdure, baseline in pairs]
    print(f"{case.name}: final weights equal in all {len(pairs)} rounds of {case.steps:,} steps")
    print(f"  bare loop      {bare_rate:9.2f} steps/s")
    print(f"  trainer.run    {rate:9.2f} steps/s")
    print(
        f"  ratio          {statistics.median(ratios):9.3f}  (median of pairs; "
        f"{min(ratios):.3f} to {max(ratios):.3f})   target >= {case.target}"
    )
    print(f"  added          {1e6 / rate - 1e6 / bare_rate:9.0f} µs a step")
    if starts:
        start, bare_start = (statistics.median(values) for values in zip(*starts, strict=True))
        print(
            f"  first step after {start:7.2f} s, bare {bare_start:.2f} s, ratio "
            f"{start / bare_start:.2f}   target <= 1.3"
        )
    print(f"  measured in    {time.time() - began:9.0f} s", flush=True)
    return True


def main() -> int:
    """Measure one case, or each after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), help="default: each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: enough for a figure")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    arguments = parser.parse_args()
    cases = [CASES[arguments.case]] if arguments.case else list(CASES.values())
    with tempfile.TemporaryDirectory() as folder:
        arguments.text = f"{folder}/text"
        if CASES["gpt"] in cases:
            prepare_text(arguments.text)
        for case in cases:
            steps = arguments.steps or case.steps
            selected = replace(case, steps=max(steps, case.warm_up_steps + case.log_every))
            if not measure(selected, arguments, folder):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
