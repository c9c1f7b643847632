"""One HTML page of a run, or of several beside one another."""

from collections.abc import Sequence

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, StoreError
from trainer.reporting import facts, page
from trainer.reporting.facts import Facts
from trainer.storage import local_path, open_store

__all__ = ["Facts", "render", "write"]

FILE_NAME = "report.html"


def render(urls: Sequence[str], settings: ObjectStore = ObjectStore()) -> str:  # noqa: B008 (frozen)
    """Return the page of one run, or the one that compares several. Reads only.

    Raises:
        ConfigError: no run lies at one of the places.
        StoreError: one of them cannot be reached.
    """
    runs = [facts.gather(url, settings) for url in urls]
    return page.single(runs[0]) if len(runs) == 1 else page.several(runs)


def write(
    urls: Sequence[str],
    out: str | None = None,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> str:
    """Write the page; return where it lies: `out`, else in the run, else compare.html here.

    Raises:
        ConfigError: no run lies at one of the places, or the page cannot be written there.
        StoreError: one of them cannot be reached.
    """
    content = render(urls, settings).encode("utf-8", "backslashreplace")
    place = out or (f"{urls[0].rstrip('/')}/{FILE_NAME}" if len(urls) == 1 else "compare.html")
    parent, slash, name = place.rpartition("/")
    if not name or (not slash and local_path(place) is None):
        raise ConfigError(f"out={place}: give the name of a file, such as {FILE_NAME}")
    try:
        open_store(parent or ("/" if slash else "."), settings).replace(name, content)
    except StoreError as error:
        raise ConfigError(f"{error}; give another place with out=…") from None
    return place
