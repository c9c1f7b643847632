"""`tensorboard/`: event files that TensorBoard reads; no step twice and none missing.

Written with TensorBoard's own records and messages, one event a line. An attempt has a file of its
own, whose name sorts after those before it. It begins with the mark by which TensorBoard drops
what an earlier attempt wrote of steps that come again.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.storage import Store, local_path
from trainer.tracking import jsonl, libraries

FOLDER = "tensorboard"
_POSITION = ("step", "epoch", "samples", "time", "split")


class TensorBoard:
    """Writes scalars such as `train/loss` and `eval/accuracy` into `<run_dir>/tensorboard`.

    On an object store, which cannot append, each attempt's file holds the whole run: it grows in a
    folder for temporary files, and is copied up now and then and at the end.

    Args:
        upload_every_s: seconds between copies to an object store.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, upload_every_s: float = 300.0) -> None:
        if text := self.problem({}):
            raise ConfigError(f"TensorBoard {text}")
        import tensorboard.compat.proto.event_pb2  # here, and not beside the training
        import tensorboard.summary.writer.record_writer  # noqa: F401

        self._upload_every_s = upload_every_s
        self._uploaded_s = time.monotonic()
        self._records: Any = None
        self._file: Any = None
        self._store: Store | None = None  # where the file is copied to, if it is
        self._name = ""
        self._folder = Path()

    @classmethod
    def problem(cls, arguments: Mapping[str, Any]) -> str:
        """Return what is wrong before anything starts."""
        return libraries.missing("tensorboard", "tensorboard")

    def start(self, facts: Mapping[str, Any]) -> None:
        """Begin this attempt's file; void what comes again, and write what the run has before."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if (folder := local_path(facts["run_dir"])) is not None:
            self._folder = folder / FOLDER
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._store = facts["store"]
            self._folder = Path(tempfile.mkdtemp(prefix="perdure-tensorboard-"))
        is_first = not any(self._folder.glob("*tfevents*"))
        void_from = 0 if is_first else _void_from(facts)
        self._name = f"events.out.tfevents.{facts['attempt']:010d}.perdure"
        self._file = open(self._folder / self._name, "wb")  # noqa: SIM115 (close)
        self._records = RecordWriter(self._file)
        now = time.time()
        self._write([{"wall_time": now, "file_version": "brain.Event:2"}])
        mark = SessionLog(status=SessionLog.START)
        self._write([{"wall_time": now, "step": void_from, "session_log": mark}])
        lines = jsonl.read(facts["store"])  # of steps that do not come again
        self._write(_event(line) for line in lines if line["step"] >= void_from)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one event; it is with the operating system on return."""
        if self._file is not None:
            self._write([_event(line)])

    def _write(self, events: Iterable[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        for event in events:
            self._records.write(Event(**event).SerializeToString())
        self._file.flush()

    def message(self, text: str) -> None:
        """Ignored: only figures are kept."""

    def flush(self) -> None:
        """Make every event durable; on an object store, only now and then."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        if time.monotonic() - self._uploaded_s >= self._upload_every_s:
            self._upload()

    def _upload(self) -> None:
        if self._store is None:
            return
        self._uploaded_s = time.monotonic()
        key = f"{FOLDER}/{self._name}"
        self._store.replace(key, (self._folder / self._name).read_bytes())
        # each file holds the whole run, so this one replaces those of earlier attempts
        self._store.delete([older for older in self._store.list(FOLDER) if older < key])

    def close(self) -> None:
        """Make every event durable, where the run lives."""
        if self._file is None:
            return
        self._upload_every_s = 0.0
        self.flush()
        self._file.close()
        self._file = None
        if self._store is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _void_from(facts: Mapping[str, Any]) -> int:
    """Return the first step of which something comes again.

    At `step` itself it is the evaluation, if the checkpoint is from before its end.
    """
    step: int = facts["step"]
    return step if facts["last_eval_step"] < step else step + 1


def _event(line: Mapping[str, Any]) -> dict[str, Any]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=f"{line['split']}/{key}", simple_value=_number(value))
        for key, value in line.items()
        if key not in _POSITION
    ]
    summary = Summary(value=values)
    return {"wall_time": line["time"], "step": line["step"], "summary": summary}


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)  # as JSON has it
