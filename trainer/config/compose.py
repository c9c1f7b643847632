"""Composition of a run's configuration from its arguments, through Hydra's compose API."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from trainer.config import overrides
from trainer.config.changed_target import drop_inherited
from trainer.config.merge import merge
from trainer.config.schema import Run
from trainer.core.scratch import user_folder
from trainer.errors import ConfigError, Problem, closest, problems_text

_FLAGS = ("--config-dir", "--help")


def conf_folder() -> Path:
    """Return the folder of the shipped configuration: installed, or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(
    arguments: Sequence[str], usage: str, flags: Sequence[str] = ()
) -> tuple[Run, list[Problem]]:
    """Compose and merge a configuration; return it with its problems. Imports no target.

    Args:
        arguments: overrides, and `--config-dir FOLDER`.
        usage: help text of the command, shown if an argument is unknown.
        flags: other flags of the command, for the closest name; the caller has removed them.

    Raises:
        ConfigError: an argument is unknown, or Hydra cannot compose the configuration.
    """
    from hydra.core.hydra_config import HydraConfig

    try:
        node, problems = compose_node(arguments, usage, flags)
        run, merge_problems = merge(node)
    finally:
        HydraConfig.instance().cfg = None
    return run, [*problems, *merge_problems]


def compose_node(
    arguments: Sequence[str], usage: str, flags: Sequence[str] = ()
) -> tuple[DictConfig, list[Problem]]:
    """Compose a configuration; see `compose`. Sets HydraConfig, for `${hydra:…}`."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    settings, folders = _parse(arguments, usage, flags)
    dirs = [f"--config-dir={folder}" for folder in folders]
    prepared = overrides.prepare([*dirs, *settings], conf_folder())
    if prepared.swept:
        swept = [a for a in settings if a.partition("=")[0].lstrip("+") in prepared.swept]
        texts = " ".join(overrides.quoted(*a.split("=", 1)) for a in swept)
        raise ConfigError(
            f"{', '.join(prepared.swept)}: give one value; sweeps need python -m trainer.run "
            f"--multirun. To give it as text: {texts}"
        )
    search_path = json.dumps([f"file://{folder}" for folder in folders])
    rewritten = [argument for argument in prepared.arguments if argument not in dirs]
    store_schema()
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            node = hydra_compose(
                "config",
                overrides=[*rewritten, *([f"hydra.searchpath={search_path}"] if folders else [])],
                return_hydra_config=True,
            )
            HydraConfig.instance().set_config(node)
            OmegaConf.set_struct(node, False)
            drop_inherited(node)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise compose_error(prepared.problems, error) from None
    del node["hydra"]
    return node, prepared.problems


def compose_groups(choices: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """Return the nodes of chosen groups, such as `data=mnist`, with their interpolations.

    Args:
        choices: the groups.
        folders: folders with additional groups.

    Raises:
        ConfigError: a choice is unknown, or Hydra cannot compose it.
    """
    from hydra.core.hydra_config import HydraConfig

    try:
        node, problems = compose_node([*(f"--config-dir={f}" for f in folders), *choices], "")
    finally:
        HydraConfig.instance().cfg = None
    if problems:
        raise ConfigError(problems_text(problems))
    keys = [choice.partition("=")[0] for choice in choices]
    return {key: OmegaConf.to_container(node[key], resolve=False) for key in keys}


def store_schema() -> None:
    """Register with Hydra what conf/config.yaml refers to: `schema` with all defaults."""
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("perdure.user_folder", lambda: str(user_folder()), replace=True)
    node = OmegaConf.to_container(OmegaConf.structured(Run))
    ConfigStore.instance().store(name="schema", node=node)


def compose_error(problems: Sequence[Problem], error: Exception) -> ConfigError:
    """Return the error for a configuration that Hydra cannot compose, with all other problems."""
    return ConfigError(problems_text([*problems, Problem("command line", str(error).strip())]))


def as_setting(flag: str, rest: Iterator[str]) -> str:
    """Return a hint if a flag is written as `--key value` or `--key=value` instead of `key=value`.

    Args:
        flag: an unknown flag.
        rest: arguments after it; the flag's value is taken.
    """
    key, equals, value = flag.removeprefix("--").partition("=")
    valid = {item.name for item in fields(Run)}
    if not flag.startswith("--") or key.partition(".")[0].replace("-", "_") not in valid:
        return ""
    return (
        f"; settings have no dashes: {key.replace('-', '_')}={value if equals else next(rest, '…')}"
    )


def _parse(
    arguments: Sequence[str], usage: str, flags: Sequence[str]
) -> tuple[list[str], list[Path]]:
    """Return the overrides, and the folders of `--config-dir`.

    Raises:
        ConfigError: any other argument.
    """
    rest, folders = config_folders(arguments, usage)
    settings = []
    remaining = iter(rest)
    for argument in remaining:
        if argument.startswith("-") or not ("=" in argument or argument.startswith("~")):
            hint = as_setting(argument, remaining) or closest(argument, [*_FLAGS, *flags])
            raise ConfigError(f"no such argument: {argument!r}{hint}\n{usage}")
        settings.append(argument)
    return settings, folders


def config_folders(arguments: Sequence[str], usage: str) -> tuple[list[str], list[Path]]:
    """Split off `--config-dir FOLDER`; return the other arguments and the folders.

    Raises:
        ConfigError: a folder is not a directory.
    """
    others, folders = [], []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in ("--config-dir", "-cd"):
            others.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not (value and Path(value).is_dir()):
            raise ConfigError(f"--config-dir {value!r} is not a directory\n{usage}")
        folders.append(Path(value).resolve())
    return others, folders
