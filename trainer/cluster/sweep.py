"""Hydra's own command line: sweeps, jobs that Hydra submits to SLURM, --help and --cfg."""

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from trainer.cluster import outcome
from trainer.config import overrides
from trainer.config.compose import compose_error, conf_folder, store_schema
from trainer.errors import DONE, FAILURE, RUN_AGAIN, PerdureError, Problem

_MAX_NAME_PART = 200
"""Maximum length of a swept value in a run's name, in characters."""
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


def main(arguments: Sequence[str], run_one: Callable[[DictConfig, Sequence[Problem]], int]) -> int:
    """Run Hydra's command line; return 0, or the most severe exit code of the jobs.

    Args:
        arguments: overrides and flags.
        run_one: runs one composed configuration, given the problems of the overrides.

    Raises:
        ConfigError: Hydra cannot compose the configuration.
        PerdureError: a submitted job failed.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    prepared = overrides.prepare(arguments, conf_folder())
    store_schema()
    codes: list[int] = []
    started: list[bool] = []

    def job(composed: DictConfig) -> None:
        started.append(True)
        is_sweep = _name_job(composed, prepared.swept)
        if "SUBMITIT_EXECUTOR" in os.environ:
            codes.append(_run_submitted(lambda: run_one(composed, prepared.problems)))
        else:
            codes.append(run_one(composed, prepared.problems))
        if is_sweep and codes[-1] == RUN_AGAIN:
            raise SystemExit(RUN_AGAIN)

    sys.argv = [sys.argv[0], *prepared.arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing and exiting with 1
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if started:
            raise
        raise compose_error(prepared.problems, error) from None
    except Exception as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        raise PerdureError(f"a job of the sweep failed: {error}") from None
    failed = [code for code in codes if code != DONE]
    return FAILURE if FAILURE in failed else (failed or [DONE])[0]


def _run_submitted(run_one: Callable[[], int]) -> int:
    """Run in a submitted job. submitit exits with 0 after an error, so write the outcome here."""
    try:
        code = run_one()
    except Exception:
        traceback.print_exc()
        outcome.write(FAILURE)
        raise
    outcome.write(code)
    if code not in (DONE, RUN_AGAIN):
        raise PerdureError(f"a job of the sweep exited with {code}; see its log")
    return code


def _name_job(composed: DictConfig, swept: Sequence[str]) -> bool:
    """Add the swept values to the run's name, for a separate directory; return if it is a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return False
    task = [text.lstrip("+") for text in settings.overrides.task]
    parts = [text for text in task if text.partition("=")[0] in swept]
    parts = [text for text in parts if not text.startswith("name=")]
    if parts and not OmegaConf.is_missing(composed, "name"):
        OmegaConf.set_struct(composed, False)
        composed.name = "-".join([composed.name.replace("/", "."), *map(_name_part, parts)])
    return True


def _name_part(text: str) -> str:
    """Return an override as part of a run's name, with a hash if characters were removed."""
    plain = text.replace("/", ".")
    valid = re.sub(r"[^\w.,=+@-]", "", plain)[:_MAX_NAME_PART]
    if valid == plain:
        return valid
    return f"{valid}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
