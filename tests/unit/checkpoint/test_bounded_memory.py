"""Checkpoints larger than the memory that is allowed: read, verified, copied, compared, written."""

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
"""Beside what Python and torch need to be there; stacks of threads count too."""
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
held = int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (held + ALLOWED, held + ALLOWED))
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
    file = store.open_new(f"{folder.name}/{name}", layout.total_bytes)
    made = Manifest(
        step=1, epoch=0, samples=0, attempt=0, token="0" * 8, save=1, world_size=1, versions={},
        tensors={key: TensorEntry(*size, file=0) for key, size in sizes.items()},
        files={name: write_shard(file, layout, LiveTensors(layout, tensor_of))}, objects={},
    )  # fmt: skip
    store.create(f"{folder.name}/{lineage.MANIFEST}", manifest.to_bytes(made))


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
    verb, *places = arguments
    done = limited(
        "sys.exit(checkpoints.main(sys.argv[1:]))", verb, *(large / place for place in places)
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
    """torch maps the file, which counts as data of the process; so the peak is looked at."""
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
    place = open_location(str(tmp_path / "out"))
    assert place.reader(pick(place, "latest")).fetch("x.7").unique().tolist() == [7]


def test_dcp_save_makes_no_second_copy(tmp_path):
    """Of a state that fills more than half of what is allowed, on the way to the file."""
    script = """
import torch.distributed.checkpoint as d
import warnings
warnings.simplefilter("ignore")
state = {"x": torch.ones(30 << 20), "turned": torch.ones(1000, 1500).T}
d.save(state, storage_writer=dcp.PerdureStorageWriter(sys.argv[1]))
"""
    done = limited(script, tmp_path / "a")
    assert (done.returncode, done.stderr) == (0, "")
    place = open_location(str(tmp_path / "a"))
    place.reader(pick(place, "latest")).verify()


# --- many shards -------------------------------------------------------------------------------


def test_reader_handles_thousand_shards_without_process_group(tmp_path):
    """One tensor cut over all of them, and one in each; with no more files open than usual."""
    store, count = LocalStore(tmp_path), 1000
    files, tensors = {}, {}
    whole = torch.arange(count * 6.0).reshape(count * 2, 3)
    for rank in range(count):
        part = {f"cut@{rank * 2},0": whole[rank * 2 : rank * 2 + 2], f"own.{rank}": whole[rank]}
        layout = shard.lay_out((key, "F32", tuple(t.shape)) for key, t in part.items())
        name = manifest.shard_name(rank=rank, world_size=count, token="0" * 8, save=1)
        file = store.open_new(f"step-5/{name}", layout.total_bytes)
        files[name] = write_shard(file, layout, LiveTensors(layout, part.__getitem__), threads=1)
        tensors[f"own.{rank}"] = TensorEntry("F32", (3,), file=rank)
    tensors["cut"] = TensorEntry("F32", (count * 2, 3), grid=(count, 1))
    made = Manifest(
        step=5, epoch=0, samples=0, attempt=0, token="0" * 8, save=1, world_size=count,
        versions={}, tensors=tensors, files=files, objects={},
    )  # fmt: skip
    store.create("step-5/manifest.json", manifest.to_bytes(made))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        place = open_location(str(tmp_path / "step-5"))
        reader = place.reader(pick(place, "latest"))
        assert torch.equal(reader.fetch("cut"), whole)
        assert torch.equal(reader.fetch("own.777"), whole[777])
        reader.verify()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
