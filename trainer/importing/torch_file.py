"""What torch.save wrote: a nested dict, every tensor of it by a dotted name."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import ObjectStore
from trainer.errors import CheckpointError
from trainer.importing import pickles
from trainer.storage.transfer import local_file

_Where = tuple[str | int, ...]


class TorchFile:
    """A formats.Source: a dict, nested as it likes; a whole module stands for its state dict.

    Args:
        url: of the file.
        settings: of object stores.
        is_zip: whether it is in torch's newer format; the older one cannot be mapped.
        on_pickle: as in `pickles.load`; without it no module comes out of a file.

    Raises:
        CheckpointError: it is damaged, or holds what is not read.
        StoreError: it could not be read.
    """

    kind = "a torch.save file"

    def __init__(
        self,
        url: str,
        settings: ObjectStore,
        *,
        is_zip: bool,
        on_pickle: Callable[[str], None] | None = None,
    ) -> None:
        self.url = url
        with local_file(url, settings) as path:
            state = pickles.load(path, url, mmap=is_zip, on_pickle=on_pickle)
        if isinstance(state, nn.Module):
            state = state.state_dict()
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{url} holds a {type(state).__name__}; a dict of named tensors is needed, such "
                "as torch.save(model.state_dict(), path) writes"
            )
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.aliases: dict[str, str] = {}
        self.paths: dict[str, _Where] = {}
        self.objects: dict[str, Any] = {}
        self._found: dict[str, Tensor] = {}
        owners: dict[tuple[Any, ...], str] = {}
        try:
            for path_, value in _leaves(state, ()):
                self._add(path_, value, owners)
        except RecursionError:
            raise CheckpointError(f"{url} is nested too deeply, or contains itself") from None

    def _add(self, path: _Where, value: Any, owners: dict[tuple[Any, ...], str]) -> None:
        name = ".".join(map(str, path))
        if name in self.paths:
            raise CheckpointError(f"{self.url}: two values would both be called {name!r}")
        self.paths[name] = path
        if not isinstance(value, Tensor):
            self.objects[name] = value
            return
        pickles.check_plain(value, f"{self.url}: {name!r}")
        flags = (value.is_conj(), value.is_neg())
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride(), *flags)
        owner = owners.setdefault(memory if value.numel() else (name,), name)
        if owner != name:
            self.aliases[name] = owner
        else:
            self.tensors[name] = (value.dtype, tuple(value.shape))
            self._found[name] = value

    def fetch(self, name: str) -> Tensor:
        """Return the tensor where it lies, or a contiguous copy."""
        found = self._found.get(self.aliases.get(name, name))
        if found is None:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        return pickles.plain(found)


def _leaves(value: Any, path: _Where) -> Iterator[tuple[_Where, Any]]:
    """Yield what torch's own `flatten_state_dict` would, and empty dicts."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))  # a number says: index of a list
    elif _is_nested(value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _is_nested(value: Any) -> bool:
    """Return whether tensors or dicts are among the items of a list or tuple."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(item, (Tensor, Mapping)) or _is_nested(item) for item in value
    )
