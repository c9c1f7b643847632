"""Lines of a run that W&B has: the numbers of lines, and the offline folders to upload.

W&B numbers the rows of a run in ascending order and, when a run is continued, returns the next
number. A line's number here depends on its step only, so an attempt sends exactly the lines that
are missing, regardless of what earlier attempts sent. `wandb sync` continues the numbers of the
rows that the site has, so an offline folder has only lines that no earlier one has, counted from 0.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainer.storage import Store


def number(line: Mapping[str, Any]) -> int:
    """Return a line's number: twice its step, and one more for an evaluation."""
    step: int = line["step"]
    return 2 * step + (0 if line["split"] == "train" else 1)


@dataclass
class Sent:
    """Lines that earlier attempts sent, or stored offline.

    Args:
        next: number after the last line in `folders`, or on the site if `folders` is empty.
        folders: names of complete offline folders in the run's `wandb/`, oldest first; uploaded in
            this order, they continue the run on the site.
    """

    next: int = 0
    folders: list[str] = field(default_factory=list)


def read(store: Store, run: str) -> Sent:
    """Return what was stored for a W&B run; nothing if its file is missing or unreadable."""
    try:
        values = json.loads(store.read(_key(run)))
        return Sent(int(values["next"]), [str(folder) for folder in values["folders"]])
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return Sent()


def write(store: Store, run: str, sent: Sent) -> None:
    """Store it, replacing what was stored before."""
    store.replace(_key(run), json.dumps(asdict(sent)).encode())


def _key(run: str) -> str:
    return f"wandb/{run}.json"
