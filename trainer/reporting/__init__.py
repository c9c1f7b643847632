"""The HTML report of one run, or of several compared."""

from collections.abc import Sequence

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, StoreError
from trainer.reporting import facts, overview, page
from trainer.reporting.facts import Facts
from trainer.storage import local_path, open_store

__all__ = ["Facts", "render", "write"]

FILE_NAME = "report.html"
_MOST_RUNS = 40
"""Maximum number of runs on one page."""


def render(urls: Sequence[str], settings: ObjectStore = ObjectStore()) -> str:  # noqa: B008 (frozen)
    """Return the page of one run, or the comparison of several.

    Args:
        urls: runs, or folders of runs, which are ranked by the best values of their metrics.
        settings: of the stores.

    Raises:
        ConfigError: a URL is neither a run nor a folder of runs.
        StoreError: a store is unreachable.
    """
    return _page(*_gather(urls, settings))


def write(
    urls: Sequence[str],
    out: str | None = None,
    settings: ObjectStore = ObjectStore(),  # noqa: B008 (frozen)
) -> str:
    """Write the page and return its path: `out`, else in the run, else compare.html here.

    Args:
        urls: as in `render`.
        out: file to write.
        settings: of the stores.

    Raises:
        ConfigError: a URL is neither a run nor a folder of runs, or the page cannot be written.
        StoreError: a store is unreachable.
    """
    runs, note = _gather(urls, settings)
    content = _page(runs, note).encode("utf-8", "backslashreplace")
    path = out or (f"{runs[0].url.rstrip('/')}/{FILE_NAME}" if len(runs) == 1 else "compare.html")
    parent, slash, name = path.rpartition("/")
    if not name or (not slash and local_path(path) is None):
        raise ConfigError(f"out={path}: not a file name; use for example {FILE_NAME}")
    try:
        open_store(parent or ("/" if slash else "."), settings).replace(name, content)
    except StoreError as error:
        raise ConfigError(f"{error}; choose another path with out=…") from None
    return path


def _gather(urls: Sequence[str], settings: ObjectStore) -> tuple[list[Facts], str]:
    """Return the runs, those of folders ranked, and a note if some are left out."""
    run_urls = [run for url in urls for run in overview.find(url, settings)]
    is_ranked = run_urls != [url.rstrip("/") or "/" for url in urls]
    note = ""
    if len(run_urls) > _MOST_RUNS:
        note = f"The best {_MOST_RUNS} of {len(run_urls):,} runs, by their latest records."
        run_urls = [row.run for row in overview.read_rows(run_urls, settings)[:_MOST_RUNS]]
    runs = [facts.gather(url, settings) for url in run_urls]
    if is_ranked:
        runs.sort(key=lambda run: facts.rank(run.best))
    return runs, note


def _page(runs: Sequence[Facts], note: str) -> str:
    return page.single(runs[0]) if len(runs) == 1 else page.several(runs, note)
