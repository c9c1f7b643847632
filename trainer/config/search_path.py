"""Folders with configuration groups: those that Hydra searches in addition to the shipped one.

They come from `--config-dir`, from `hydra.searchpath` on the command line or in the primary
configuration, and from Hydra plugins.
"""

import importlib.util
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

_CONFIG_DIR = ("--config-dir", "-cd")
_CONFIG_NAME = ("--config-name", "-cn")
_KEY = "hydra.searchpath"


def search_path(arguments: Sequence[str]) -> list[Path]:
    """Return the folders that exist; packages are not imported."""
    config_dirs = [Path(value) for value in _values(arguments, _CONFIG_DIR) if value]
    locations = [*_overridden(arguments), *_configured(arguments, config_dirs), *_of_plugins()]
    folders = [*config_dirs, *(path for text in locations if (path := _folder(text)))]
    return [folder for folder in folders if folder.is_dir()]


def _values(arguments: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """Yield the values of flags, written as `--flag value` or `--flag=value`."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in flags:
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            yield value if equals else following


def _overridden(arguments: Sequence[str]) -> Iterator[str]:
    parser = OverridesParser.create()
    for argument in arguments:
        if argument.lstrip("+").startswith(f"{_KEY}="):
            with suppress(HydraException):  # Hydra reports it
                yield from _texts(parser.parse_override(argument).value())


def _configured(arguments: Sequence[str], config_dirs: Sequence[Path]) -> Iterator[str]:
    """Yield `hydra.searchpath` of the user's own primary configuration."""
    for name in _values(arguments, _CONFIG_NAME):
        for folder in config_dirs:
            with suppress(OSError, YAMLError, OmegaConfBaseException):  # Hydra reports it
                node: Any = OmegaConf.load(folder / f"{name.removesuffix('.yaml')}.yaml")
                yield from _texts(OmegaConf.select(node, _KEY))


def _texts(value: Any) -> Iterator[str]:
    items = value if isinstance(value, (list, ListConfig)) else [value]
    yield from (item for item in items if isinstance(item, str) and item)


class _Recorded(ConfigSearchPath):
    """Search path that records what plugins add."""

    def __init__(self) -> None:
        self.locations: list[str] = []

    def get_path(self) -> MutableSequence[Any]:
        return []

    def append(self, provider: str, path: str, anchor: Any = None) -> None:
        self.locations.append(path)

    def prepend(self, provider: str, path: str, anchor: Any = None) -> None:
        self.locations.append(path)


def _of_plugins() -> list[str]:
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    recorded = _Recorded()
    for kind in Plugins.instance().discover(SearchPathPlugin):
        plugin: Any = kind()
        plugin.manipulate_search_path(recorded)
    return recorded.locations


def _folder(location: str) -> Path | None:
    """Return the folder of `file://PATH`, `pkg://PACKAGE` or a path; None if there is none."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        return Path(location)
    if scheme == "file":
        return Path(rest)
    if scheme != "pkg":
        return None
    package, *inside = rest.replace("/", ".").split(".")
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)), *inside)
    return None
