"""python -m trainer.doctor [key=value …] [--quick] [--json]: check a run before it starts."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, redirect_stdout, suppress

from trainer.cli import command
from trainer.cluster import launch
from trainer.cluster.slurm import set_rank_variables
from trainer.config import overrides, validate
from trainer.config.compose import compose
from trainer.doctor.finding import Finding, summary, text
from trainer.errors import (
    CONFIGURATION,
    DONE,
    FAILURE,
    ConfigError,
    Problem,
    problems_text,
)

_USAGE = """usage: python -m trainer.doctor [key=value …] [--quick] [--json] [--config-dir FOLDER]
  key=value  the arguments of trainer.run
  --quick    skip slow checks: start no ranks, measure no speed
  --json     print one JSON object instead of text
Under torchrun or srun, or with launch.nproc=…, it also checks the links between the ranks.
exit codes: 0 no problem found, 1 the run would fail, 2 the configuration is invalid"""
_FLAGS = ("--quick", "--json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return command(argv, _USAGE, _check, may_be_empty=True)


def _check(argv: list[str]) -> int:
    flags = {flag for flag in _FLAGS if flag in argv}
    arguments = [argument for argument in argv if argument not in flags]
    run, problems = compose(arguments, _USAGE, _FLAGS)
    set_rank_variables(run.launch.nproc)
    if problems and overrides.need_no_target(arguments):
        return _reject(problems, is_json="--json" in flags)
    from trainer.training import build  # imports torch, which is slow

    problems += build.check(run)
    is_quick = "--quick" in flags
    if not any(p.key.startswith(("launch.", "trainer.", "parallel.")) for p in problems):
        problems += validate.validate_world(run, launch.world_size(run.launch))
    if problems:
        return _reject(problems, is_json="--json" in flags)
    count = 1 if launch.is_rank() else launch.ranks_on_this_node(run.launch)
    if count > 1 and not is_quick:
        return _start_ranks(argv, count)
    from trainer.doctor import rank

    findings = list(rank.check(run, is_quick=is_quick))
    if os.environ.get("RANK", "0") == "0":
        _print(findings, is_json="--json" in flags)
    return FAILURE if any(finding.state == "red" for finding in findings) else DONE


def _reject(problems: Sequence[Problem], *, is_json: bool) -> int:
    if not is_json:
        raise ConfigError(problems_text(problems))
    if os.environ.get("RANK", "0") == "0":
        _print([Finding(p.key, "red", p.text) for p in problems], is_json=True)
    return CONFIGURATION


def _print(findings: Sequence[Finding], *, is_json: bool) -> None:
    if is_json:
        document = {"findings": [finding.as_json() for finding in findings]}
        print(json.dumps(document, indent=1), flush=True)
    else:
        print(f"{text(findings)}\n{summary(findings)}", flush=True)


def _start_ranks(argv: Sequence[str], count: int) -> int:
    """Start the ranks of this command on this machine; return their highest exit code."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with ExitStack() as running:
        ranks = []
        for rank in range(count):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "trainer.doctor", *argv]
            ranks.append(running.enter_context(subprocess.Popen(command, env=environment)))  # noqa: S603
        codes = [process.wait() for process in ranks]
    return max(code if code >= 0 else FAILURE for code in codes)


if __name__ == "__main__":
    with suppress(BrokenPipeError), redirect_stdout(sys.stdout):
        sys.exit(main())
