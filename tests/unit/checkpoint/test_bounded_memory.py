"""Read, verify, copy, compare and write checkpoints larger than the memory limit."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import lineage, manifest, shard
from trainer.checkpoint.location import open_location
from trainer.checkpoint.manifest import Manifest, TensorEntry
from trainer.checkpoint.select import pick
from trainer.checkpoint.shard_writer import LiveTensors, write_shard
from trainer.storage import LocalStore

ROOT = Path(__file__).resolve().parents[3]
ALLOWED_BYTES = 256 << 20
"""Memory limit in addition to the imports of Python and torch; includes thread stacks."""
LARGE = 100 << 20
"""Elements of the largest tensor, of 4 bytes each."""

LIMITED = """
import re, resource, sys
from pathlib import Path
import torch
from trainer import checkpoints
from trainer.checkpoint import dcp
from trainer.checkpoint import location, select
from trainer.importing import formats
torch.set_num_threads(1)
base = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (base + ALLOWED, base + ALLOWED))
"""


def limited(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED.replace("ALLOWED", str(ALLOWED_BYTES)) + script,
         *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def write(folder: Path, change: float = 0.0) -> None:
    """Write one tensor of 400 MiB and many small ones as one checkpoint, without holding it."""
    store = LocalStore(folder.parent)
    row = torch.arange(1 << 20, dtype=torch.float32)
    sizes = {"large": ("F32", (LARGE >> 20, 1 << 20))}
    sizes |= {f"small.{number}": ("F32", (1000,)) for number in range(200)}

    def tensor_of(key: str) -> torch.Tensor:
        if key == "large":
            return row.expand(LARGE >> 20, 1 << 20)
        return torch.full((1000,), change)

    layout = shard.lay_out((key, *size) for key, size in sizes.items())
    name = manifest.shard_name(rank=0, world_size=1, token="0" * 8, save=1)
    live = LiveTensors(layout, tensor_of)
    record = Manifest(
        step=1, epoch=0, samples=0, attempt=0, token="0" * 8, save=1, world_size=1, versions={},
        tensors={key: TensorEntry(*size, file=0) for key, size in sizes.items()},
        files={name: write_shard(store, f"{folder.name}/{name}", layout, live)}, objects={},
    )  # fmt: skip
    store.create(f"{folder.name}/{lineage.MANIFEST}", manifest.to_bytes(record))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write(folder / "one")
    write(folder / "two", change=1.0)
    return folder


def test_memory_limit_is_enforced(large):
    done = limited("import numpy; numpy.ones((300 << 20,), numpy.uint8)")
    assert "MemoryError" in done.stderr


def test_reading_entire_tensor_exceeds_limit(large):
    script = (
        'p = location.open_location(sys.argv[1]); p.reader(select.pick(p, "latest")).fetch("large")'
    )
    assert "memory" in limited(script, large / "one").stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("verify", "one"), 0, "intact, 420 MB read"),
        (("diff", "one", "two"), 1, "equal   1 tensor"),
        (("copy", "one", "copied"), 0, "1 checkpoint copied"),
    ],
)
def test_command_needs_memory_for_few_parts(large, arguments, code, text):
    verb, *folders = arguments
    done = limited(
        "sys.exit(checkpoints.main(sys.argv[1:]))",
        verb,
        *(large / location for location in folders),
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert text in done.stdout


def test_small_tensors_are_read_within_limit(large):
    script = """
p = location.open_location(sys.argv[1])
reader = p.reader(select.pick(p, "latest"))
print(sum(reader.fetch(f"small.{number}").sum().item() for number in range(200)))
part = torch.empty(1, 1 << 20)
from trainer.checkpoint.box import Box
reader.read_boxes([("large", Box((50, 0), (1, 1 << 20)), part)])
print(part[0, -1].item())
"""
    done = limited(script, large / "two")
    assert done.stdout == f"{200 * 1000.0}\n{(1 << 20) - 1.0}\n", done.stderr


def test_torch_save_file_is_imported_tensor_by_tensor(tmp_path):
    """The limit would include the file that torch maps, so the test measures peak memory."""
    torch.save({f"x.{number}": torch.full((10 << 20,), number) for number in range(10)},
               tmp_path / "all.pt")  # fmt: skip
    script = """
import re, sys, threading, time
from pathlib import Path
from trainer import checkpoints
from trainer.importing import dcp_folder, formats
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
before, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
code = checkpoints.main(["copy", *sys.argv[1:]])
print(peak - before)
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "all.pt"), str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < int(done.stdout.split()[-1]) < 200 << 20  # of 400 MiB
    location = open_location(str(tmp_path / "out"))
    assert location.reader(pick(location, "latest")).fetch("x.7").unique().tolist() == [7]


def test_dcp_save_makes_no_second_copy(tmp_path):
    """The state fills more than half of the memory limit."""
    script = """
import torch.distributed.checkpoint as d
import warnings
warnings.simplefilter("ignore")
state = {"x": torch.ones(30 << 20), "turned": torch.ones(1000, 1500).T}
d.save(state, storage_writer=dcp.PerdureStorageWriter(sys.argv[1]))
"""
    done = limited(script, tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, "")
    location = open_location(str(tmp_path / "a"))
    location.reader(pick(location, "latest")).verify()


# --- many shards ---------------------------------------------------------------------------------


def test_reader_handles_thousand_shards_without_process_group(tmp_path):
    """Every shard holds a part of one tensor and a tensor of its rank; 256 open files suffice."""
    store, count = LocalStore(tmp_path), 1000
    files, tensors = {}, {}
    tensor = torch.arange(count * 6.0).reshape(count * 2, 3)
    for rank in range(count):
        part = {f"cut@{rank * 2},0": tensor[rank * 2 : rank * 2 + 2], f"own.{rank}": tensor[rank]}
        layout = shard.lay_out((key, "F32", tuple(t.shape)) for key, t in part.items())
        name = manifest.shard_name(rank=rank, world_size=count, token="0" * 8, save=1)
        live = LiveTensors(layout, part.__getitem__)
        files[name] = write_shard(store, f"step-5/{name}", layout, live)
        tensors[f"own.{rank}"] = TensorEntry("F32", (3,), file=rank)
    tensors["cut"] = TensorEntry("F32", (count * 2, 3), grid=(count, 1))
    record = Manifest(
        step=5, epoch=0, samples=0, attempt=0, token="0" * 8, save=1, world_size=count,
        versions={}, tensors=tensors, files=files, objects={},
    )  # fmt: skip
    store.create("step-5/manifest.json", manifest.to_bytes(record))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        location = open_location(str(tmp_path / "step-5"))
        reader = location.reader(pick(location, "latest"))
        assert torch.equal(reader.fetch("cut"), tensor)
        assert torch.equal(reader.fetch("own.777"), tensor[777])
        reader.verify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
