"""Hydra's own command line: sweeps, jobs that Hydra submits to SLURM, --help and --cfg."""

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.cluster import outcome
from trainer.config import overrides
from trainer.config.changed_target import drop_inherited
from trainer.config.compose import as_setting, compose_error, conf_folder, store_schema
from trainer.errors import (
    DONE,
    FAILURE,
    RUN_AGAIN,
    ConfigError,
    PerdureError,
    Problem,
    problems_text,
)

_MAX_NAME_PART = 200
"""Maximum length of a swept value in a run's name, in characters."""
_MAX_NAME_BYTES = 255
"""Maximum length of a run's name, a directory name, on all common file systems."""
_SHOWING = {"--cfg", "-c", "--info", "-i"}
"""Flags of Hydra that show the configuration and run nothing."""
_COMPOSED = ("--config-dir", "-cd")


def is_hydra_command(arguments: Sequence[str]) -> bool:
    """Return whether Hydra's command line has to handle the arguments.

    True for flags such as --multirun, --help, --cfg and --config-name, and for overrides of
    Hydra's own settings.
    """
    return any(
        (argument.startswith("-") and argument.partition("=")[0] not in _COMPOSED)
        or argument.lstrip("+~").startswith(("hydra.", "hydra/"))
        for argument in arguments
    )


def _check_flags(arguments: Sequence[str]) -> None:
    """Reject settings that are written as flags, before Hydra's parser prints its usage."""
    rest = iter(arguments)
    for argument in rest:
        if hint := as_setting(argument, rest):
            raise ConfigError(f"no such argument: {argument!r}{hint}")


class JobFailedError(PerdureError):
    """A job of a sweep failed; pickled by launchers that run jobs in other processes."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.exit_code = code

    def __str__(self) -> str:
        return f"a job of the sweep exited with {self.exit_code}; see its log"


def main(
    arguments: Sequence[str],
    run_one: Callable[[DictConfig, Sequence[Problem]], int],
    value: Callable[[DictConfig], float | None],
) -> int:
    """Run Hydra's command line; return 0, or the most severe exit code of the jobs.

    Args:
        arguments: overrides and flags.
        run_one: runs one composed configuration, given the problems of the overrides.
        value: result of a finished job, for the sweeper.

    Raises:
        ConfigError: Hydra cannot compose the configuration.
        PerdureError: a submitted job failed.
    """
    import hydra
    from hydra.errors import HydraException

    _check_flags(arguments)
    prepared = overrides.prepare(arguments, conf_folder())
    if prepared.problems and {a.partition("=")[0] for a in arguments} & _SHOWING:
        raise ConfigError(problems_text(prepared.problems))
    store_schema()
    fixed = overrides.fixed_values(prepared.arguments)
    codes: list[int] = []
    run_dirs: list[str] = []

    def job(composed: DictConfig) -> float | None:
        problems = [*prepared.problems, *_set_up_job(composed, fixed, run_dirs)]
        code = _run_job(lambda: run_one(composed, problems))
        codes.append(code)
        if code == RUN_AGAIN and is_sweep():
            raise SystemExit(RUN_AGAIN)  # of submitit's jobs too: no result before they ran again
        if code not in (DONE, RUN_AGAIN):
            raise JobFailedError(code)
        return value(composed) if code == DONE else None

    sys.argv = [sys.argv[0], *prepared.arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and exiting with 1
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except JobFailedError:
        if not codes:  # it ran in another process
            raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if run_dirs:
            raise
        raise compose_error(prepared.problems, error) from None
    except Exception as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        raise PerdureError(f"a job of the sweep failed: {error}") from None
    failed = [code for code in codes if code != DONE]
    return FAILURE if FAILURE in failed else (failed or [DONE])[0]


def _run_job(run_one: Callable[[], int]) -> int:
    """Run a job. submitit exits with 0 after an error, so write the outcome of its jobs here."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return run_one()
    try:
        code = run_one()
    except Exception:
        traceback.print_exc()
        outcome.write(FAILURE)
        raise
    outcome.write(code)
    return code


def is_sweep() -> bool:
    """Return whether the configuration composed last is that of a sweep (`hydra.mode`)."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def _set_up_job(
    composed: DictConfig, fixed: Collection[tuple[str, str]], run_dirs: list[str]
) -> list[Problem]:
    """Add the job's own values to its name, for a separate run directory.

    Args:
        composed: the job's configuration; changed.
        fixed: values that all jobs have, by key.
        run_dirs: run directories of earlier jobs in this process; this job's is added.

    Returns:
        The problem of a run directory that other jobs have too.
    """
    from hydra.core.hydra_config import HydraConfig

    texts: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    values = {text: overrides.value_of(text) for text in texts if not text.startswith("~")}
    newest = {key: text for text, (key, _) in values.items()}  # the last override of a key counts
    varied = [text.lstrip("+") for text in newest.values() if values[text] not in fixed]
    parts = [text for text in varied if not text.startswith("name=")]
    in_sweep = is_sweep()
    OmegaConf.set_struct(composed, False)
    drop_inherited(composed)
    if in_sweep and parts and not OmegaConf.is_missing(composed, "name"):
        composed.name = job_name(composed.name, parts)
    plain: Any = OmegaConf.to_container(composed, resolve=False)
    raw = str(plain.get("run_dir"))
    try:
        run_dir = str(composed.run_dir)
    except OmegaConfBaseException:  # reported by the merge
        run_dir = raw
    is_fixed = "${" not in re.sub(r"\$\{oc\.env:[^{}]*\}", "", raw) and not any(
        text.startswith("run_dir=") for text in varied
    )
    is_shared = in_sweep and bool((is_fixed and varied) or run_dir in run_dirs)
    run_dirs.append(run_dir)
    if not is_shared:
        return []
    text = f"{run_dir!r} is the same for several jobs of the sweep; use run_dir='{raw}/${{name}}'"
    return [Problem("run_dir", text)]


def job_name(name: str, parts: Sequence[str]) -> str:
    """Return the name of a sweep's job: that of the sweep and the job's own overrides.

    Names that are too long for a directory are shortened and end in a hash.
    """
    full = "-".join([name.replace("/", "."), *map(_name_part, parts)])
    if len(full.encode()) <= _MAX_NAME_BYTES:
        return full
    suffix = f"-{hashlib.blake2b(full.encode(), digest_size=8).hexdigest()}"
    return full.encode()[: _MAX_NAME_BYTES - len(suffix)].decode(errors="ignore") + suffix


def _name_part(text: str) -> str:
    """Return an override as part of a run's name, with a hash if characters were removed."""
    plain = text.replace("/", ".")
    valid = re.sub(r"[^\w.,=+@-]", "", plain)[:_MAX_NAME_PART]
    if valid == plain:
        return valid
    return f"{valid}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
