"""Weights & Biases: all attempts of a run are one W&B run; network failures do not stop training.

A separate thread calls the library and takes lines from a queue; training never waits for it. What
the site does not have, the thread takes from `metrics.jsonl`.
"""

import netrc
import os
import queue
import shlex
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.core import metric_mode
from trainer.core.scratch import scratch_folder
from trainer.errors import ConfigError, closest
from trainer.storage import local_path
from trainer.tracking import code, jsonl, libraries, wandb_state
from trainer.tracking.artifacts import log_artifacts

_MODES = ("online", "offline", "disabled")
_ARTIFACTS = ("manifests", "files")
_SPARE_S = 2.0
"""Extra seconds for the thread to notice a timeout of the library."""


class Wandb:
    """Log to a run of Weights & Biases, each line once. `step` is the axis of all metrics.

    What the site does not have, also from earlier attempts, is taken from `metrics.jsonl`.

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
        queue_lines: maximum pending lines; once exceeded, later lines are sent at the end.

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
        self._is_behind = False  # the queue was full; the thread takes the rest from the file
        self._is_over = False  # no more logging
        self._outcome = "error"
        self._next = 0  # number of the first line that is not sent
        self._offset = 0  # from a line's number to that of its row
        self._folder = Path()
        self._scratch = ExitStack()

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
            self._folder = self._scratch.enter_context(scratch_folder("wandb"))
        self._thread = threading.Thread(
            target=self._work, args=(facts,), name="wandb-tracker", daemon=True
        )
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Put one line into the queue."""
        if self._thread is None or self._is_over or self._is_behind:
            return
        if self._queue.qsize() >= self._queue_lines:
            self._is_behind = True
            _warn(f"{self._queue_lines:,} lines are pending; later lines are sent at the end")
            return
        self._queue.put(dict(line))

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
                "metrics.jsonl has the unsent lines, and the next attempt sends them"
            )
        if not self._thread.is_alive():
            self._scratch.close()
        self._thread = None

    # --- on the thread ---------------------------------------------------------------------------

    def _work(self, facts: Mapping[str, Any]) -> None:
        try:
            run = self._begin(facts)
            sent = self._read_sent(run, facts)
            lines = jsonl.read(facts["store"])
            newest = {"train": facts["step"], "eval": facts["last_eval_step"]}
            self._send(run, (line for line in lines if line["step"] <= newest[line["split"]]))
            while (line := self._queue.get()) is not None:
                self._send(run, [line])
            if self._is_behind:
                self._send(run, jsonl.read(facts["store"]))
            self._end(run, sent, facts)
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

    def _read_sent(self, run: Any, facts: Mapping[str, Any]) -> wandb_state.Sent:
        """Find the first line to send, and return what earlier attempts stored offline."""
        sent = wandb_state.read(facts["store"], run.id)
        if run.offline:
            self._next = self._offset = sent.next
        elif not run.disabled:
            self._next = run.step
            # This attempt sends everything that is missing, so offline folders are not needed.
            sent = wandb_state.Sent(self._next)
            wandb_state.write(facts["store"], run.id, sent)
        return sent

    def _send(self, run: Any, lines: Iterable[Mapping[str, Any]]) -> None:
        """Log the lines that W&B does not have."""
        for line in lines:
            if (number := wandb_state.number(line)) >= self._next:
                run.log(_row(line), step=number - self._offset, commit=True)
                self._next = number + 1

    def _end(self, run: Any, sent: wandb_state.Sent, facts: Mapping[str, Any]) -> None:
        import wandb

        is_done = self._outcome == "done"
        if is_done and self._artifacts is not None:
            log_artifacts(run, facts, with_files=self._artifacts == "files")
        if self._outcome == "preempted":
            run.mark_preempting()
        folder, is_offline = Path(run.settings.sync_dir), run.offline
        try:
            run.finish(exit_code=0 if is_done else 1)
            is_complete = True
        except TimeoutError:
            is_complete = False
        wandb.teardown()  # waits for the library's own process, which writes the files
        if run.disabled:
            return
        if is_complete:
            folders = [*sent.folders, _keep(folder, facts)] if is_offline else []
            sent = wandb_state.Sent(self._next, folders)
            wandb_state.write(facts["store"], run.id, sent)
        else:
            flag = "" if is_offline else "--no-skip-online "
            _warn(
                f"did not end in {self._close_timeout_s:g} s (tracker.wandb.close_timeout_s), so "
                "lines may be missing. The next attempt sends or stores them. Without one, "
                f"`wandb sync {flag}{folder}` sends the lines of this attempt, some of them again"
            )
        _print_commands(sent.folders, facts)


def _keep(folder: Path, facts: Mapping[str, Any]) -> str:
    """Keep an offline folder in the run; return its name."""
    if local_path(facts["run_dir"]) is None:
        for path in folder.glob("*.wandb"):
            facts["store"].replace(f"wandb/{folder.name}/{path.name}", path.read_bytes())
    return folder.name


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    position = {key: line[key] for key in ("step", "epoch", "samples")}
    metrics = {f"{line['split']}/{k}": v for k, v in line.items() if k not in jsonl.POSITION}
    return position | metrics


def _print_commands(folders: Iterable[str], facts: Mapping[str, Any]) -> None:
    """Print how to upload the offline folders that are not uploaded yet, in their order."""
    run = local_path(facts["run_dir"])
    location = str(run) if run is not None else facts["store"].url
    missing = [
        f"{location}/wandb/{folder}"
        for folder in folders
        if run is None or not any((run / "wandb" / folder).glob("*.wandb.synced"))
    ]
    if missing:
        commands = " && ".join(f"wandb sync {shlex.quote(path)}" for path in missing)
        copies = "" if run is not None else " (with local copies of the folders)"
        print(f"wandb: to upload the offline data: {commands}{copies}", flush=True)


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
