"""TensorBoard event files in `tensorboard/`; each step is shown exactly once.

Written with TensorBoard's record writer, one event per line. Each attempt has a file whose name
sorts after those of earlier attempts. It starts with the session mark by which TensorBoard drops
repeated steps. torch's SummaryWriter writes the same mark (`purge_step`), but names files by clock:
if the next node's clock is behind, the mark is read too early and repeated steps are shown. It also
has no fsync, and a killed process loses its queue. TensorBoard's data server ignores the mark; it
drops a metric's later steps when an earlier one follows, so each metric's last valid line is
written again.
"""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.core.scratch import scratch_folder
from trainer.errors import ConfigError
from trainer.storage import Store, local_path
from trainer.tracking import jsonl, libraries

FOLDER = "tensorboard"


class TensorBoard:
    """Write scalars such as `train/loss` and `eval/accuracy` to `<run_dir>/tensorboard`.

    Object stores cannot append, so each attempt's file has the complete run there: it grows in a
    temporary folder and is uploaded periodically and at the end.

    Args:
        upload_every_s: seconds between uploads to an object store.

    Raises:
        ConfigError: the library is not installed.
    """

    def __init__(self, upload_every_s: float = 300.0) -> None:
        if text := self.problem({}):
            raise ConfigError(f"TensorBoard {text}")
        import tensorboard.compat.proto.event_pb2  # here, not during training
        import tensorboard.summary.writer.record_writer  # noqa: F401

        self._upload_every_s = upload_every_s
        self._uploaded_s = time.monotonic()
        self._records: Any = None
        self._file: Any = None
        self._store: Store | None = None  # upload destination, if remote
        self._name = ""
        self._folder = Path()
        self._scratch = ExitStack()

    @classmethod
    def problem(cls, arguments: Mapping[str, Any]) -> str:
        """Return the reason why this tracker cannot work, or an empty string."""
        return libraries.missing("tensorboard", "tensorboard")

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start this attempt's file: void repeated steps, and write the run's earlier lines."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if (folder := local_path(facts["run_dir"])) is not None:
            self._folder = folder / FOLDER
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._store = facts["store"]
            self._folder = self._scratch.enter_context(scratch_folder("tensorboard"))
        is_first = not any(self._folder.glob("*tfevents*"))
        lines = jsonl.read(facts["store"])  # steps that are not repeated
        void_from = 0 if is_first else _oldest_last_step(lines)
        self._name = f"events.out.tfevents.{facts['attempt']:010d}.perdure"
        self._file = open(self._folder / self._name, "wb")  # noqa: SIM115 (close)
        self._records = RecordWriter(self._file)
        now = time.time()
        self._write([{"wall_time": now, "file_version": "brain.Event:2"}])
        mark = SessionLog(status=SessionLog.START)
        self._write([{"wall_time": now, "step": void_from, "session_log": mark}])
        self._write(_event(line) for line in lines if line["step"] >= void_from)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one event; the operating system has it on return."""
        if self._file is not None:
            self._write([_event(line)])

    def _write(self, events: Iterable[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        for event in events:
            self._records.write(Event(**event).SerializeToString())
        self._file.flush()

    def message(self, text: str) -> None:
        """Do nothing; only metrics are stored."""

    def flush(self) -> None:
        """Make every event durable; on an object store, upload if due."""
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
        # each file has the complete run, so this one replaces those of earlier attempts
        self._store.delete([older for older in self._store.list(FOLDER) if older < key])

    def close(self) -> None:
        """Make every event durable in the run directory."""
        if self._file is None:
            return
        self._upload_every_s = 0.0
        self.flush()
        self._file.close()
        self._file = None
        self._scratch.close()


def _oldest_last_step(lines: Iterable[Mapping[str, Any]]) -> int:
    """Return the first step from which every metric has its last line."""
    last = {(line["split"], key): line["step"] for line in lines for key in line}
    return min(last.values(), default=0)


def _event(line: Mapping[str, Any]) -> dict[str, Any]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [
        Summary.Value(tag=f"{line['split']}/{key}", simple_value=_number(value))
        for key, value in line.items()
        if key not in jsonl.POSITION
    ]
    summary = Summary(value=values)
    return {"wall_time": line["time"], "step": line["step"], "summary": summary}


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)  # null in JSON
