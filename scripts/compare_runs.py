"""Compare the newest checkpoints and the metrics of two runs, bit for bit.

python scripts/compare_runs.py RUN_A RUN_B; exit code 0 if they are identical, 1 if not.
Only `time`, `*_s` and `*_per_s` of metrics.jsonl may differ.
"""

import sys

import torch

from trainer import checkpoint
from trainer.checkpoint import lineage
from trainer.storage import open_store
from trainer.tracking import jsonl


def differences(run_a: str, run_b: str) -> list[str]:
    """Return what differs between two runs; empty if nothing does."""
    texts = []
    opened = []
    for run in (run_a, run_b):
        store = open_store(run)
        commit = lineage.commits(store)[-1]
        manifest = lineage.read_manifest(store, commit)
        opened.append((manifest, checkpoint.Reader(store, commit.folder, manifest)))
    (a, read_a), (b, read_b) = opened
    if a.step != b.step:
        texts.append(f"step: {a.step} and {b.step}")
    if set(a.tensors) != set(b.tensors):
        texts.append(f"names of tensors: {sorted(set(a.tensors) ^ set(b.tensors))}")
    for name in sorted(set(a.tensors) & set(b.tensors)):
        tensor_a, tensor_b = read_a.fetch(name), read_b.fetch(name)
        same = tensor_a.dtype == tensor_b.dtype and torch.equal(_bits(tensor_a), _bits(tensor_b))
        if not same:
            texts.append(f"tensor {name}")
    for key in sorted(set(a.objects) | set(b.objects)):
        if repr(a.objects.get(key)) != repr(b.objects.get(key)):
            texts.append(f"object {key}: {a.objects.get(key)!r} and {b.objects.get(key)!r}")
    lines_a, lines_b = _metrics(run_a), _metrics(run_b)
    if len(lines_a) != len(lines_b):
        texts.append(f"metrics.jsonl: {len(lines_a)} and {len(lines_b)} lines")
    for tensor_a, tensor_b in zip(lines_a, lines_b, strict=False):
        if tensor_a != tensor_b:
            texts.append(f"metrics.jsonl: {tensor_a} and {tensor_b}")
    return texts


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _metrics(run: str) -> list[dict[str, object]]:
    return [
        {k: v for k, v in line.items() if k != "time" and not k.endswith(("_s", "_per_s"))}
        for line in jsonl.read(open_store(run))
    ]


def main() -> int:
    texts = differences(*sys.argv[1:3])
    print("\n".join(texts[:40]) or "identical")
    return int(bool(texts))


if __name__ == "__main__":
    sys.exit(main())
