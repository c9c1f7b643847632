"""Read torch.save files: a nested dict with dotted tensor names."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from trainer.config.schema import ObjectStore
from trainer.errors import CheckpointError
from trainer.importing import pickles
from trainer.storage.transfer import local_file

_Where = tuple[str | int, ...]


class TorchFile:
    """A formats.Source for a nested dict, or for the state dict of a pickled module.

    Args:
        url: the file, or a folder.
        settings: object store settings.
        files: names of the files in a folder whose tensors belong together.
        on_pickle: see `pickles.load`; required for a pickled module.

    Raises:
        CheckpointError: the file is damaged, or has content that is never read.
        StoreError: the store failed.
    """

    kind = "a torch.save file"

    def __init__(
        self,
        url: str,
        settings: ObjectStore,
        *,
        files: Sequence[str] = ("",),
        on_pickle: Callable[[str], None] | None = None,
    ) -> None:
        self.url = url
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.aliases: dict[str, str] = {}
        self.paths: dict[str, _Where] = {}
        self.objects: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        owners: dict[tuple[Any, ...], str] = {}
        for file in files:
            where = f"{url}/{file}" if file else url
            state = _state(where, settings, on_pickle)
            try:
                for path, value in _leaves(state, ()):
                    self._add(path, value, owners)
            except RecursionError:
                raise CheckpointError(f"{where} is nested too deeply, or contains itself") from None

    def _add(self, path: _Where, value: Any, owners: dict[tuple[Any, ...], str]) -> None:
        name = ".".join(map(str, path))
        if name in self.paths:
            raise CheckpointError(f"{self.url}: two values have the name {name!r}")
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
            self._tensors[name] = value

    def fetch(self, name: str) -> Tensor:
        """Return the tensor itself, or a contiguous copy."""
        tensor = self._tensors.get(self.aliases.get(name, name))
        if tensor is None:
            raise CheckpointError(f"{self.url} has no tensor {name!r}")
        return pickles.plain(tensor)


def _state(
    url: str, settings: ObjectStore, on_pickle: Callable[[str], None] | None
) -> Mapping[Any, Any]:
    """Load one file's dict."""
    try:
        with local_file(url, settings) as path, open(path, "rb"):
            # Files in the format before zip archives cannot be memory-mapped.
            state = pickles.load(path, url, mmap=is_zipfile(path), on_pickle=on_pickle)
    except FileNotFoundError:
        raise CheckpointError(f"{url} is missing") from None
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{url} contains a {type(state).__name__}; expected a dict of named tensors, as "
            "written by torch.save(model.state_dict(), path)"
        )
    return state


def _leaves(value: Any, path: _Where) -> Iterator[tuple[_Where, Any]]:
    """Yield the leaves of torch's `flatten_state_dict`, and empty dicts."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping) and (value or not path):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))  # integers are list indexes
    elif _is_nested(value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _is_nested(value: Any) -> bool:
    """Return whether a list or tuple contains tensors or dicts."""
    return isinstance(value, (list, tuple)) and any(
        isinstance(item, (Tensor, Mapping)) or _is_nested(item) for item in value
    )
