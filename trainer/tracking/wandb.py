"""Weights & Biases: all attempts of a run are one W&B run; network failures do not stop training.

A separate thread calls the library and takes lines from a queue; training never waits for it.
"""

import netrc
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.core import metric_mode
from trainer.errors import ConfigError, closest
from trainer.storage import Store, local_path
from trainer.tracking import code, libraries
from trainer.tracking.artifacts import log_artifacts

_MODES = ("online", "offline", "disabled")
_ARTIFACTS = ("manifests", "files")
_SPARE_S = 2.0
"""Extra seconds for the thread to notice a timeout of the library."""


class Wandb:
    """Log to a run of Weights & Biases. `step` is the axis of all metrics.

    Args:
        project: default: WANDB_PROJECT, else `perdure`.
        entity: team or user; default: the logged-in one.
        mode: `online`, `offline` (files in the run, for `wandb sync`) or `disabled`; default:
            WANDB_MODE, else `online`.
        id: of the W&B run; default: derived from the first attempt, so all attempts share it.
        options: further arguments of `wandb.init`, such as `group`, `tags`, `notes`.
        artifacts: log the newest and best checkpoint and the exports at the end of the run, with
            `manifests` or `files` of the checkpoints; None: no artifacts.
        init_timeout_s: without a response for this long, the attempt is stored offline.
        close_timeout_s: maximum wait for pending lines at the end of an attempt.
        queue_lines: maximum pending lines; further ones are dropped.

    Raises:
        ConfigError: the library is not installed, or no API key is configured.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        mode: str | None = None,
        id: str | None = None,
        options: dict[str, Any] | None = None,
        artifacts: str | None = None,
        init_timeout_s: float = 60.0,
        close_timeout_s: float = 15.0,
        queue_lines: int = 10_000,
    ) -> None:
        if text := self.problem({"mode": mode, "artifacts": artifacts}):
            raise ConfigError(f"tracker.wandb {text}")
        import wandb  # noqa: F401 (here, not during training)

        self._project = project or os.environ.get("WANDB_PROJECT", "perdure")
        self._mode = mode or _default_mode()
        self._entity, self._id, self._options = entity, id, options or {}
        self._artifacts = artifacts
        self._init_timeout_s, self._close_timeout_s = init_timeout_s, close_timeout_s
        self._queue_lines = queue_lines
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._dropped_lines = 0
        self._is_over = False  # no more logging
        self._outcome = "error"
        self._folder = Path()
        self._store: Store | None = None  # upload destination, if remote

    @classmethod
    def problem(cls, arguments: Mapping[str, Any]) -> str:
        """Return the reason why this tracker cannot work, or an empty string."""
        if text := libraries.missing("wandb", "wandb"):
            return text
        mode, artifacts = arguments.get("mode") or _default_mode(), arguments.get("artifacts")
        if mode not in _MODES:
            return f"has mode={mode!r}{closest(mode, _MODES)}"
        if artifacts is not None and artifacts not in _ARTIFACTS:
            return f"has artifacts={artifacts!r}{closest(str(artifacts), _ARTIFACTS)}"
        if mode == "online" and not _has_key():
            return (
                "has no API key: log in with `wandb login`, or set WANDB_API_KEY; or keep the run "
                "on disk with tracker.wandb.mode=offline"
            )
        return ""

    def start(self, facts: Mapping[str, Any]) -> None:
        """Start logging in a separate thread."""
        if (folder := local_path(facts["run_dir"])) is not None:
            self._folder = folder
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._store = facts["store"]
            self._folder = Path(tempfile.mkdtemp(prefix="perdure-wandb-"))
        self._thread = threading.Thread(
            target=self._work, args=(facts,), name="wandb-tracker", daemon=True
        )
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Put one line into the queue."""
        if self._thread is None or self._is_over:
            return
        if self._queue.qsize() >= self._queue_lines:
            self._dropped_lines += 1
            if self._dropped_lines == 1:
                _warn(f"{self._queue_lines:,} lines are pending; further lines are dropped")
            return
        position = {key: line[key] for key in ("step", "epoch", "samples")}
        hidden = {*position, "time", "split"}
        metrics = {f"{line['split']}/{k}": v for k, v in line.items() if k not in hidden}
        self._queue.put({**position, **metrics})

    def message(self, text: str) -> None:
        """Do nothing; only metrics are stored."""

    def flush(self) -> None:
        """Do nothing; `metrics.jsonl` is the durable copy."""

    def ended(self, outcome: str) -> None:
        """Record the outcome of the attempt for the state of the W&B run."""
        self._outcome = outcome

    def close(self) -> None:
        """Send pending lines for at most `close_timeout_s`."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(self._close_timeout_s + _SPARE_S)
        if self._thread.is_alive() and not self._is_over:
            _warn(
                f"did not end in {self._close_timeout_s:g} s (tracker.wandb.close_timeout_s); "
                "metrics.jsonl has the unsent lines"
            )
        if self._dropped_lines:
            _warn(f"{self._dropped_lines:,} lines were dropped; metrics.jsonl has them")
        self._thread = None

    # --- on the thread ---------------------------------------------------------------------------

    def _work(self, facts: Mapping[str, Any]) -> None:
        try:
            run = self._begin(facts)
            while (line := self._queue.get()) is not None:
                run.log(line)
            self._end(run, facts)
        except Exception as error:  # any error concerns this tracker only
            _warn(f"is disabled for this attempt: {type(error).__name__}: {error}")
        self._is_over = True

    def _begin(self, facts: Mapping[str, Any]) -> Any:
        """Open the run, offline if the server is unreachable."""
        import wandb

        try:
            run = self._init(facts, self._mode)
        except wandb.errors.Error as error:
            if self._mode != "online":
                raise
            wandb.teardown()
            run = self._init(facts, "offline")
            _warn(f"is offline for this attempt: {' '.join(str(error).split())}")
        if not (run.offline or run.disabled):
            print(f"wandb: {run.url}", flush=True)
        run.define_metric("step", hidden=True)
        for split in ("train", "eval"):
            run.define_metric(f"{split}/*", step_metric="step")
        checkpoint_settings = facts["config"].get("checkpoint", {})
        if checkpoint_settings.get("metric"):
            metric = str(checkpoint_settings["metric"])
            mode = metric_mode.resolve(metric, checkpoint_settings.get("mode"))
            run.define_metric(f"eval/{metric}", step_metric="step", summary=mode)
        return run

    def _init(self, facts: Mapping[str, Any], mode: str) -> Any:
        import wandb

        code_version = code.version(os.getcwd())
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,  # it would also send what is not committed
            git_commit=code_version.get("commit"),
            init_timeout=self._init_timeout_s,
            login_timeout=1.0,  # never prompt for a key during a job
            finish_timeout=self._close_timeout_s,
            finish_timeout_raises=True,
        )
        hooks = sys.exit, sys.excepthook
        try:
            return wandb.init(
                project=self._project,
                entity=self._entity,
                id=self._id or facts["run_id"],
                resume="allow",
                mode=mode,  # type: ignore[arg-type]
                dir=str(self._folder),
                config={**facts["config"], "code": code_version, "attempt": facts["attempt"]},
                settings=settings,
                **{"name": facts["config"].get("name"), **self._options},
            )
        finally:
            sys.exit, sys.excepthook = hooks  # `ended` reports the outcome

    def _end(self, run: Any, facts: Mapping[str, Any]) -> None:
        import wandb

        folder = Path(run.settings.sync_dir)
        is_done = self._outcome == "done"
        if is_done and self._artifacts is not None:
            log_artifacts(run, facts, with_files=self._artifacts == "files")
        if self._outcome == "preempted":
            run.mark_preempting()
        is_sent = not run.offline
        try:
            run.finish(exit_code=0 if is_done else 1)
        except TimeoutError:
            is_sent = False
        wandb.teardown()  # waits for the library's own process, which writes the files
        if is_sent or run.disabled:
            return
        if self._store is not None:
            for path in folder.glob("*.wandb"):
                self._store.replace(f"wandb/{folder.name}/{path.name}", path.read_bytes())
            location = f"{self._store.url}/wandb/{folder.name} (a copy of it)"
        else:
            location = str(folder)
        print(f"wandb: to upload the offline data: wandb sync {location}", flush=True)


def _default_mode() -> str:
    return os.environ.get("WANDB_MODE", "online")


def _has_key() -> bool:
    """Return whether an API key is configured, in the environment or by `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = os.environ.get("WANDB_BASE_URL")
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(server).hostname in hosts if server else bool(hosts)


def _warn(text: str) -> None:
    with suppress(OSError):
        print(f"wandb: {text}", file=sys.stderr, flush=True)
