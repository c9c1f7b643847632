"""A run's configuration from its arguments, for commands that look at it before the run does."""

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from trainer import errors
from trainer.config import overrides
from trainer.config.folder import conf_folder
from trainer.config.merge import merge
from trainer.config.schema import Run
from trainer.errors import ConfigError, Problem

_FLAGS = ("--config-dir", "--help")


def compose(
    arguments: Sequence[str], usage: str, flags: Sequence[str] = ()
) -> tuple[Run, list[Problem]]:
    """Compose and merge as `trainer.run` does; return the configuration and what is wrong with it.

    Targets are not looked at: see `build.check`.

    Args:
        arguments: overrides, and `--config-dir FOLDER`.
        usage: of the command, shown with every argument that is not understood.
        flags: of the command, which it has taken out.

    Raises:
        ConfigError: the arguments cannot be read, or Hydra finds no such configuration.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    settings, folders = _without_folders(arguments, usage, flags)
    chosen = [f"--config-dir={folder}" for folder in folders]
    prepared = overrides.prepare([*chosen, *settings], conf_folder())
    if prepared.swept:
        raise ConfigError(f"{', '.join(prepared.swept)}: give one value; a sweep is of trainer.run")
    places = [f"file://{folder}" for folder in folders]
    more = [f"hydra.searchpath={json.dumps(places)}"] if places else []
    given = [a for a in prepared.arguments if a not in chosen]
    ConfigStore.instance().store(
        name="schema", node=OmegaConf.to_container(OmegaConf.structured(Run))
    )
    try:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            node = hydra_compose("config", overrides=[*given, *more], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        found = [*prepared.problems, Problem("command line", str(error).strip())]
        raise ConfigError(errors.problems_text(found)) from None
    HydraConfig.instance().set_config(node)  # for ${hydra:…}
    try:
        OmegaConf.set_struct(node, False)
        del node["hydra"]
        run, problems = merge(node)
    finally:
        HydraConfig.instance().cfg = None
    return run, [*prepared.problems, *problems]


def _without_folders(
    arguments: Sequence[str], usage: str, flags: Sequence[str]
) -> tuple[list[str], list[Path]]:
    """Return the overrides, and the folders of `--config-dir`.

    Raises:
        ConfigError: something else was typed.
    """
    settings, folders = [], []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = value if equals else next(rest, "")
            if not (folder and Path(folder).is_dir()):
                raise ConfigError(f"--config-dir {folder!r} is no folder\n{usage}")
            folders.append(Path(folder).resolve())
        elif argument.startswith("-") or not (equals or argument.startswith("~")):
            hint = errors.closest(argument, [*_FLAGS, *flags])
            raise ConfigError(f"there is no argument {argument!r}{hint}\n{usage}")
        else:
            settings.append(argument)
    return settings, folders
