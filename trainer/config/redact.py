"""Stored form of a configuration: plain values without secrets."""

import copy
import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

_REDACTED = "<redacted>"
_SECRET = re.compile(
    r"(^|_)(password|passwd|pwd|passphrase|secrets?|credentials?|api_?key"
    r"|(access|secret|private)_?key"
    r"|(?<!per_)(?<!pad_)(?<!bos_)(?<!eos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token)$"
)


def stored(composed: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON values with secrets redacted.

    Interpolations are resolved, except those that read the environment: they remain text, so
    that the value of a variable never reaches a file. A value that refers to a secret, or to one
    of these texts, gets the stored form.
    """
    safe = copy.deepcopy(composed)
    texts: dict[str, str] = {}
    options = OmegaConf.select(safe, "store.options")
    for key in options or ():
        options[key] = _REDACTED  # any of them may be a credential
    _hide(safe, texts)
    plain: dict[str, Any] = _plain(safe, texts)
    return plain


def _is_secret(key: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)  # hfToken as hf_token
    return _SECRET.search(snake.lower()) is not None


def _hide(node: Any, texts: dict[str, str]) -> None:
    """Replace secrets, and texts that read the environment by keys of `texts`."""
    raw: Any = OmegaConf.to_container(node, resolve=False)
    items: Any = raw.items() if isinstance(raw, dict) else enumerate(raw)
    for key, value in items:
        if isinstance(key, str) and _is_secret(key) and value is not None:
            node[key] = _REDACTED
        elif isinstance(value, str) and "oc.env" in value:
            name = f"PERDURE_TEXT_{len(texts)}_"
            texts[name] = value
            node[key] = name
        elif isinstance(value, (dict, list)):
            _hide(node[key], texts)


def _plain(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, ListConfig):
        return [_plain(_resolved(value, index), texts) for index in range(len(value))]
    if isinstance(value, DictConfig):
        return {str(key): _plain(_resolved(value, key), texts) for key in value}
    if isinstance(value, str):
        for name, text in texts.items():
            value = value.replace(name, text)
    return value


def _resolved(node: DictConfig | ListConfig, key: Any) -> Any:
    try:
        return node[key]
    except OmegaConfBaseException:  # computed from a text that reads the environment
        raw: Any = OmegaConf.to_container(node, resolve=False)
        return raw[key]
