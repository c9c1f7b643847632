"""The HTML report of one run, or of several compared."""

from collections.abc import Sequence

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, StoreError
from trainer.reporting import facts, page
from trainer.reporting.facts import Facts
from trainer.storage import local_path, open_store

__all__ = ["Facts", "render", "write"]

FILE_NAME = "report.html"


def render(urls: Sequence[str], settings: ObjectStore = ObjectStore()) -> str:  # noqa: B008 (frozen)
    """Return the page of one run, or the comparison of several.

    Raises:
        ConfigError: a URL is not a run.
        StoreError: a store is unreachable.
    """
    runs = [facts.gather(url, settings) for url in urls]
    return page.single(runs[0]) if len(runs) == 1 else page.several(runs)


def write(
    urls: Sequence[str],
    out: str | None = None,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> str:
    """Write the page and return its path: `out`, else in the run, else compare.html here.

    Raises:
        ConfigError: a URL is not a run, or the page cannot be written.
        StoreError: a store is unreachable.
    """
    content = render(urls, settings).encode("utf-8", "backslashreplace")
    path = out or (f"{urls[0].rstrip('/')}/{FILE_NAME}" if len(urls) == 1 else "compare.html")
    parent, slash, name = path.rpartition("/")
    if not name or (not slash and local_path(path) is None):
        raise ConfigError(f"out={path}: not a file name; use for example {FILE_NAME}")
    try:
        open_store(parent or ("/" if slash else "."), settings).replace(name, content)
    except StoreError as error:
        raise ConfigError(f"{error}; choose another path with out=…") from None
    return path
