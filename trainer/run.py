"""python -m trainer.run [key=value …]: compose, check, launch, build, train, exit code."""

from trainer.cluster.early_stop import NAMES, early_stop

if __name__ == "__main__":
    early_stop.record()  # before the slow imports

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf

from trainer.cluster import launch, outcome, slurm, sweep
from trainer.config import overrides
from trainer.config.compose import compose_node
from trainer.config.merge import merge
from trainer.config.redact import stored
from trainer.config.schema import Run
from trainer.config.validate import validate_world
from trainer.core import threads
from trainer.core.scratch import user_folder
from trainer.errors import (
    DONE,
    FAILURE,
    ConfigError,
    PeerFailedError,
    PeerLostError,
    PerdureError,
    Problem,
    WorkerLostError,
    print_error,
    problems_text,
    version_text,
)

_GROUP_TIMEOUT_S = 600.0
_CHECK_RUN = "--check=run"
_CHECKS = ("--check", _CHECK_RUN)
"""Flags that check the configuration, and compute one batch of it."""
_HELP_HINT = "See python -m trainer.run --help."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (the table is in trainer.errors)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threads.die_with_parent()  # a killed agent would leave its ranks running
        if arguments[:1] == ["--worker"]:
            return _worker(Path(arguments[1]))
        code = _command(arguments)
    except PerdureError as error:
        return _report(error)
    if not launch.is_rank():
        outcome.write(code)
    return code


def _report(error: PerdureError) -> int:
    print_error(error)
    outcome.write(error.exit_code)
    return error.exit_code


def _command(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(version_text())
        return DONE
    if arguments in (["--help"], ["-h"]):
        from trainer.config.run_help import run_help

        print(run_help())
        return DONE
    checks = [argument for argument in arguments if argument in _CHECKS]
    arguments = [argument for argument in arguments if argument not in _CHECKS]
    run_one = partial(
        _run_one,
        check=checks[-1] if checks else "",
        need_no_target=overrides.need_no_target(arguments),
    )
    if not sweep.is_hydra_command(arguments):
        composed, problems = compose_node(arguments, _HELP_HINT, [*_CHECKS, "--multirun"])
        if not sweep.is_sweep():
            return run_one(composed, problems)
    early_stop.answer(NAMES)
    return sweep.main(arguments, run_one, _job_value)


def _run_one(
    composed: DictConfig, problems: Sequence[Problem], *, check: str, need_no_target: bool
) -> int:
    try:
        return _check_and_start(composed, problems, check, need_no_target=need_no_target)
    except PerdureError as error:
        return _report(error)


def _check_and_start(
    composed: DictConfig, problems: Sequence[Problem], check: str, *, need_no_target: bool
) -> int:
    run, merge_problems = merge(composed)
    slurm.set_rank_variables(run.launch.nproc)
    early_stop.answer(run.preemption.signals)
    problems = [*problems, *merge_problems]
    if problems and need_no_target:
        raise ConfigError(problems_text(problems))  # before the import of torch, which is slow
    from trainer.training import build

    problems += build.check(run)
    if not any(p.key.startswith(("launch.", "trainer.", "parallel.")) for p in problems):
        problems += validate_world(run, launch.world_size(run.launch))
    if problems:
        raise ConfigError(problems_text(problems))
    if check:
        from trainer.training import rehearsal

        tried = ""
        rehearsal.check_optimizer(run)
        if check == _CHECK_RUN:
            rehearsal.check(run, launch.world_size(run.launch))
            tried = " A training batch and an evaluation batch were computed."
        print(f"The configuration of {run.run_dir} is fine.{tried} Nothing was started.")
        return DONE
    plain = stored(composed)
    return _rank(run, plain) if launch.is_rank() else _launch(run, plain)


def _job_value(composed: DictConfig) -> float | None:
    """Return the value that a sweeper optimizes."""
    from trainer.training import resume

    run, _ = merge(composed)
    return resume.final_value(run)


def _launch(run: Run, stored: Mapping[str, Any]) -> int:
    """Check that the run can be written and resumed; then become the only rank or start all."""
    from trainer.training import admission, messages, resume

    replicas = resume.open_replicas(run)
    admission.check_stores(run, replicas)
    start = resume.choose(replicas, run, stored)
    if resume.finished(run, start):
        print(messages.finished_text(run, start.state))
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
    """Return the folder for the output of ranks other than 0: in the run, if it is local."""
    from trainer.storage import local_path

    if (path := local_path(run.run_dir)) is not None:
        return path / "logs"
    digest = hashlib.blake2b(run.run_dir.encode(), digest_size=4).hexdigest()
    return user_folder() / "logs" / f"{run.name}-{digest}"  # the same name in two buckets


def _worker(file: Path) -> int:
    """Run as a rank that `_launch` started."""
    payload = json.loads(file.read_text())
    run, problems = merge(OmegaConf.create(payload["run"]))
    early_stop.answer(run.preemption.signals)
    if problems:
        raise ConfigError(problems_text(problems))
    return _rank(run, payload["stored"], is_checked=True)


def _rank(run: Run, stored: Mapping[str, Any], *, is_checked: bool = False) -> int:
    """Join the process group, train, close it; return the exit code. Collective."""
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
            code = _report(error) if world.rank == 0 else error.exit_code
        if world.rank == 0:
            outcome.write(code)  # before the first rank exits and its launcher kills the others
        world.close()
    except SystemExit:
        raise
    except BaseException as error:
        if not launch.is_rank():
            raise
        raise SystemExit(outcome.report_crash(error)) from None
    return outcome.rank_exit_code(code)


def _leave(error: PeerFailedError | PeerLostError) -> NoReturn:
    """Exit because another process was lost. The process with the cause reports it."""
    if isinstance(error, PeerFailedError):
        outcome.exit_now(error.exit_code)
    if isinstance(error, WorkerLostError) and launch.is_rank():
        outcome.exit_now(outcome.report_crash(error))
    outcome.exit_to_resume(str(error))


def _end(code: int) -> NoReturn:
    """End the process without waiting for threads and library destructors.

    In 1 of 12 gloo jobs a rank aborted in a destructor after training had finished.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, full or missing
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        _end(main())
    except BrokenPipeError:  # the reader closed the pipe
        _end(FAILURE)
    except SystemExit as error:
        _end(error.code if isinstance(error.code, int) else FAILURE if error.code else DONE)
