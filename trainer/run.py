"""python -m trainer.run [key=value …]: compose, check, launch, build, train, exit code."""

import hashlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from trainer import errors
from trainer.cluster import launch, outcome, slurm
from trainer.config.folder import conf_folder
from trainer.config.merge import merge
from trainer.config.redact import stored
from trainer.config.schema import Run
from trainer.config.validate import validate_world
from trainer.core import threads
from trainer.errors import (
    DONE,
    FAILURE,
    RUN_AGAIN,
    ConfigError,
    PeerFailedError,
    PeerLostError,
    PerdureError,
    Problem,
    StoreError,
    WorkerLostError,
)

_GROUP_TIMEOUT_S = 600.0
_LONGEST_PART = 200
"""Characters of a swept value in a run's name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (the table is in trainer.errors)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threads.die_with_parent()  # an agent that is killed leaves its ranks behind
        if arguments[:1] == ["--worker"]:
            return _worker(Path(arguments[1]))
        code = _command(arguments)
    except PerdureError as error:
        return _say_error(error)
    if not launch.is_rank():
        outcome.write(code)
    return code


def _say_error(error: PerdureError) -> int:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    outcome.write(error.exit_code)
    return error.exit_code


# --- compose and check -------------------------------------------------------------------------


def _command(arguments: list[str]) -> int:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from trainer.config import overrides

    check_only = "--check" in arguments
    prepared = overrides.prepare([a for a in arguments if a != "--check"], conf_folder())
    ConfigStore.instance().store(
        name="schema", node=OmegaConf.to_container(OmegaConf.structured(Run))
    )
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        is_sweep = _name_sweep_job(composed, prepared.swept)
        one_run = partial(_one_run, composed, prepared.problems, check_only)
        codes.append(_submitted(one_run) if "SUBMITIT_EXECUTOR" in os.environ else one_run())
        if is_sweep and codes[-1] == RUN_AGAIN:
            raise SystemExit(RUN_AGAIN)

    sys.argv = [sys.argv[0], *prepared.arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and exiting with 1
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if codes or not _is_compose_error(error):
            raise
        found = [*prepared.problems, Problem("command line", str(error).strip())]
        raise ConfigError(errors.problems_text(found)) from None
    except Exception as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        raise PerdureError(f"a job of the sweep has failed: {error}") from None
    failed = [code for code in codes if code != DONE]
    return FAILURE if FAILURE in failed else (failed or [DONE])[0]


def _submitted(one_run: Callable[[], int]) -> int:
    """Run in a job that Hydra has submitted: it keeps errors, and ends as if all were well."""
    try:
        code = one_run()
    except Exception:
        traceback.print_exc()
        outcome.write(FAILURE)
        raise
    outcome.write(code)
    if code not in (DONE, RUN_AGAIN):
        raise PerdureError(f"a job of the sweep ended with {code}; its log says why")
    return code


def _is_compose_error(error: BaseException) -> bool:
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    return "job" not in frames


def _name_sweep_job(composed: DictConfig, swept: Sequence[str]) -> bool:
    """In a multirun, add the job's swept values to its name, so that each has its directory."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return False
    chosen = [text.lstrip("+") for text in settings.overrides.task]
    parts = [text for text in chosen if text.partition("=")[0] in swept]
    parts = [text for text in parts if not text.startswith("name=")]
    if parts and not OmegaConf.is_missing(composed, "name"):
        OmegaConf.set_struct(composed, False)
        parts = [composed.name.replace("/", "."), *map(_in_a_name, parts)]
        composed.name = "-".join(parts)
    return True


def _in_a_name(text: str) -> str:
    """Return an override as a part of a run's name; with a hash, where a name cannot hold it."""
    plain = text.replace("/", ".")
    kept = re.sub(r"[^\w.,=+@-]", "", plain)[:_LONGEST_PART]
    if kept == plain:
        return kept
    return f"{kept}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _one_run(composed: DictConfig, problems: Sequence[Problem], check_only: bool) -> int:
    try:
        slurm.set_rank_variables()
        return _check_and_start(composed, problems, check_only)
    except PerdureError as error:
        return _say_error(error)


def _check_and_start(composed: DictConfig, problems: Sequence[Problem], check_only: bool) -> int:
    from trainer.training import build

    run, found = merge(composed)
    found = [*problems, *found, *build.check(run)]
    if not any(p.key.startswith(("launch.", "trainer.", "parallel.")) for p in found):
        found += validate_world(run, launch.world_size(run.launch))
    if found:
        raise ConfigError(errors.problems_text(found))
    if check_only:
        print(f"The configuration of {run.run_dir} is fine. Nothing was started.")
        return DONE
    plain = stored(composed)
    if launch.is_rank():
        return _rank(run, plain)
    return _launch(run, plain)


# --- launch ------------------------------------------------------------------------------------


def _launch(run: Run, stored: Mapping[str, Any]) -> int:
    """Refuse early what cannot go on, then become the only rank, or start all ranks."""
    from trainer.training import messages, resume

    replicas = resume.open_replicas(run)
    for key, store in zip(("run_dir", "checkpoint.mirror"), replicas.stores, strict=False):
        try:
            if warning := store.probe():
                print(f"WARNING: {warning}", file=sys.stderr, flush=True)
        except StoreError as error:
            advice = (
                ". With checkpoint.mirror=null the run goes on without it, if it has all here"
                if store is replicas.mirror
                else ""
            )
            text = f"{key}={store.url} cannot be written: {error}{advice}"
            raise ConfigError(text) from None
    start = resume.choose(replicas, run, stored)
    if resume.finished(run, start):
        print(messages.finished_text(run, start.step, start.epoch))
        return DONE
    if launch.ranks_on_this_node(run.launch) == 1:
        return _rank(run, stored, is_checked=True)
    payload = {"run": OmegaConf.to_container(OmegaConf.structured(run)), "stored": stored}
    return launch.run_ranks(
        payload,
        run.launch,
        logs=_logs_folder(run),
        grace_s=slurm.grace_s(run.preemption.grace_s),
    )


def _logs_folder(run: Run) -> Path:
    """Return where the output of ranks other than 0 goes: into the run, if it is a directory."""
    from trainer.storage import local_path

    if (path := local_path(run.run_dir)) is not None:
        return path / "logs"
    return Path(tempfile.gettempdir(), "perdure-logs", run.name)


def _worker(file: Path) -> int:
    """Be one of the ranks that `_launch` started."""
    payload = json.loads(file.read_text())
    run, found = merge(OmegaConf.create(payload["run"]))
    if found:
        raise ConfigError(errors.problems_text(found))
    return _rank(run, payload["stored"], is_checked=True)


def _rank(run: Run, stored: Mapping[str, Any], *, is_checked: bool = False) -> int:
    """Join the other ranks, train, and return the exit code."""
    import torch

    from trainer.cluster import world as distributed
    from trainer.training import attempt, parallel

    device = torch.device(launch.device_name(run.launch))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    parallel.choose_arithmetic(run.trainer.precision, deterministic=run.trainer.deterministic)
    try:
        world = distributed.connect(device, timeout_s=_GROUP_TIMEOUT_S)
        if world.rank == 0:
            outcome.clear()
        try:
            code = attempt.run_attempt(run, stored, world, is_checked=is_checked)
        except (PeerFailedError, PeerLostError) as error:
            _leave(error)
        except PerdureError as error:
            if world.size > 1 and not getattr(error, "agreed", False):
                raise
            code = _say_error(error) if world.rank == 0 else error.exit_code
        if world.rank == 0:
            outcome.write(code)  # before the first rank ends, and the others are killed
        world.close()
    except SystemExit:
        raise
    except BaseException as error:
        if not launch.is_rank():
            raise
        raise SystemExit(outcome.report_crash(error)) from None
    return outcome.rank_exit_code(code)


def _leave(error: PeerFailedError | PeerLostError) -> NoReturn:
    """Leave because of a process that is gone; whoever knows best why it is tells."""
    if isinstance(error, PeerFailedError):
        outcome.exit_now(error.exit_code)
    if isinstance(error, WorkerLostError) and launch.is_rank():
        outcome.exit_now(outcome.report_crash(error))
    outcome.exit_to_resume(str(error))


def _end(code: int) -> NoReturn:
    """End the process, whatever threads and libraries still do.

    A rank in a dozen gloo jobs aborted in the libraries' own end, after all was said and done.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or none
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        _end(main())
    except BrokenPipeError:  # whoever reads has seen enough
        _end(FAILURE)
    except SystemExit as error:
        _end(error.code if isinstance(error.code, int) else FAILURE if error.code else DONE)
