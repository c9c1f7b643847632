"""Readers of a run's tracker files: those of TensorBoard, and a parser of `.wandb` files."""

import json
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path


def scalars(folder):
    """Return {tag: [(step, value)]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def multiplexed(folder):
    """Return {tag: [(step, value)]} as TensorBoard without its data server shows them."""
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.util.tensor_util import make_ndarray

    reader = EventMultiplexer(size_guidance={"tensors": 0}, tensor_size_guidance={"scalars": 0})
    reader.AddRunsFromDirectory(str(folder)).Reload()
    return {
        tag: [(one.step, make_ndarray(one.tensor_proto).item()) for one in reader.Tensors(run, tag)]
        for run, tags in reader.Runs().items()
        for tag in tags["tensors"]
    }


@contextmanager
def data_server(folder):
    """Run TensorBoard's data server; yield a check that it shows {tag: [(step, value)]} soon."""
    from tensorboard import context
    from tensorboard.data.server_ingester import ExistingServerDataIngester, get_server_binary
    from tensorboard.util.grpc_util import ChannelCredsType

    def until(condition, timeout_s=30.0):
        end_s = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < end_s:
            time.sleep(0.05)

    def check(expected):
        def read():
            runs = provider.read_scalars(
                context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=10000
            )
            return {
                tag: [(one.step, one.value) for one in series]
                for tags in runs.values()
                for tag, series in tags.items()
            }

        until(lambda: read() == expected)
        assert read() == expected

    port = folder.parent / "port"
    server = subprocess.Popen(
        [get_server_binary().path, f"--logdir={folder}", "--reload=1", f"--port-file={port}",
         "--port=0", "--samples-per-plugin=scalars=all"]
    )  # fmt: skip
    try:
        until(lambda: port.exists() and port.read_text().endswith("\n"))
        address = f"localhost:{int(port.read_text())}"
        credentials = ChannelCredsType.LOCAL
        provider = ExistingServerDataIngester(address, channel_creds_type=credentials).data_provider
        yield check
    finally:
        server.kill()
        server.wait()


def records(path: Path):
    """Yield the records of a `.wandb` file: protocol buffers in a LevelDB log with a header.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, payload = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        remaining = 32768 - at % 32768
        if remaining < 7:
            at += remaining
            continue
        length, kind = struct.unpack("<4xHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + length]
        at += 7 + length
        payload = part if kind in (1, 2) else payload + part
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(payload)
            yield record


def wandb_run(path: Path):
    """Return (id, config, history, exit code or None, artifact names) of a `.wandb` file."""
    entries = list(records(path))
    (run,) = (record.run for record in entries if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    history = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in entries if record.HasField("history")
    ]  # fmt: skip
    codes = [record.exit.exit_code for record in entries if record.HasField("exit")]
    artifacts = [
        (record.artifact.name, list(record.artifact.aliases), record.artifact.manifest.contents)
        for record in entries if record.HasField("artifact")
    ]  # fmt: skip
    return run.run_id, config, history, codes[0] if codes else None, artifacts
