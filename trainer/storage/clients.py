"""obstore's clients of S3, Google Cloud Storage and Azure Blob Storage, from the settings."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError
from trainer.storage import s3
from trainer.storage.requests import FIRST_WAIT_S, LONGEST_WAIT_S, fault_of

PROTOCOLS = {
    "s3": "S3", "s3a": "S3", "gs": "GCS", "gcs": "GCS",
    "az": "Azure", "azure": "Azure", "abfs": "Azure", "abfss": "Azure",
}  # fmt: skip
"""Kind of store of each protocol."""
_EXTRAS = {"S3": "s3", "GCS": "gcs", "Azure": "azure"}
"""Extra of this package that installs the libraries of a kind of store."""
_CONNECT_S = 10.0
_REQUEST_S = 86_400.0
"""Limit of one request in seconds; `read_timeout` ends one that stalls."""
_SIGNATURE_S = 600.0
"""Seconds in which a request is repeated with the same signature, which is valid for 15 min."""
_S3FS_OPTIONS = {
    "key": "access_key_id", "secret": "secret_access_key", "token": "session_token",
    "anon": "skip_signature",
}  # fmt: skip
"""Options of s3fs by their name in obstore."""
_CLIENT_OPTIONS = {
    "allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type",
    "default_headers", "http1_only", "http2_keep_alive_interval", "http2_keep_alive_timeout",
    "http2_keep_alive_while_idle", "http2_only", "pool_idle_timeout", "pool_max_idle_per_host",
    "proxy_url", "proxy_ca_certificate", "proxy_excludes", "randomize_addresses", "read_timeout",
    "root_certificate", "timeout", "user_agent",
}  # fmt: skip
"""Options of obstore's HTTP client; all others are those of its store."""


@dataclass(frozen=True)
class Clients:
    """Clients of one bucket."""

    once: Any
    """Sends each request once, for requests that the caller repeats."""
    patient: Any
    """Repeats requests, for parts of an upload, which the caller cannot repeat."""
    uploads: "s3.Uploads | None"
    """Incomplete uploads; None: the server does not list them."""
    has_checksums: bool
    """True if requests have checksums, which an old server may reject."""


def clients(url: str, settings: ObjectStore, hidden: Callable[[str], str]) -> Clients:
    """Make the clients of a bucket with the credentials of now; nothing is sent.

    Args:
        url: of the bucket or a folder in it.
        settings: of the connection.
        hidden: removes secrets from the text of an error.

    Raises:
        ConfigError: a library is missing, or an option or the profile is wrong.
    """
    protocol, _, rest = url.partition("://")
    kind = PROTOCOLS[protocol]
    bucket, _, host = rest.partition("/")[0].partition("@")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; pip install 'perdure[{_EXTRAS[kind]}]'") from None
    classes: dict[str, Any] = {"S3": S3Store, "GCS": GCSStore, "Azure": AzureStore}
    config: dict[str, Any] = {
        "connect_timeout": _seconds(min(_CONNECT_S, settings.timeout_s)),
        "read_timeout": _seconds(settings.timeout_s),
        "timeout": _seconds(_REQUEST_S),
    }
    more: dict[str, Any] = {}
    uploads = None
    if kind == "S3":
        connection = s3.connection(url, bucket, settings)
        config |= connection.config
        more["credential_provider"] = connection.credentials
        uploads = s3.Uploads(connection, bucket, settings)
    else:
        config |= _google(settings) if kind == "GCS" else _azure(host, settings)
    config |= settings.options
    more["client_options"] = {name: config.pop(name) for name in _CLIENT_OPTIONS & config.keys()}
    make = partial(classes[kind], bucket, config=config, **more)
    try:
        once = make(retry_config={"max_retries": 0})
        patient = make(retry_config=_retries(settings))
    except (BaseError, TypeError, ValueError) as error:
        raise ConfigError(f"{url}: {_option_problem(hidden(fault_of(error).text))}") from None
    return Clients(once, patient, uploads, "checksum_algorithm" in config)


def _retries(settings: ObjectStore) -> dict[str, Any]:
    backoff = {
        "init_backoff": timedelta(seconds=FIRST_WAIT_S),
        "max_backoff": timedelta(seconds=LONGEST_WAIT_S),
        "base": 2,
    }
    limit = timedelta(seconds=_SIGNATURE_S)
    return {"max_retries": settings.retries, "retry_timeout": limit, "backoff": backoff}


def _google(settings: ObjectStore) -> dict[str, Any]:
    if not settings.endpoint_url:
        return {}
    address = settings.endpoint_url.rstrip("/")
    return {"base_url": address, "allow_http": address.startswith("http://")}


def _azure(host: str, settings: ObjectStore) -> dict[str, Any]:
    """Return the options for `container@account.dfs.core.windows.net`, or of the environment."""
    config: dict[str, Any] = {"account_name": host.partition(".")[0]} if host else {}
    named = map(os.environ.get, ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"))
    if address := settings.endpoint_url or next(filter(None, named), None):
        config |= {"endpoint": address.rstrip("/"), "allow_http": address.startswith("http://")}
    return config


def _option_problem(text: str) -> str:
    if key := re.search(r"Configuration key: '([^']*)'", text):
        name = _S3FS_OPTIONS.get(key[1])
        hint = f"write store.options.{name}" if name else "see docs/storage.md for the names"
        return f"store.options.{key[1]} is not an option of obstore; {hint}"
    return f"{text}; correct the store.* settings or the environment"


def _seconds(seconds: float) -> str:
    return f"{max(1, round(1000 * seconds))}ms"
