"""Readers of a run's tracker files: TensorBoard's event reader, and a parser of `.wandb` files."""

import json
import struct
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
