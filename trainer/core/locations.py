"""Normal form of the locations that users write: paths and URLs."""

import os
import re

_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_URL = re.compile(rf"({_SCHEME})://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(rf"({_SCHEME}):/+(?!/)(.*)", re.DOTALL)
_PROTOCOLS = (
    "abfs", "abfss", "adl", "az", "azure", "gcs", "gs", "hdfs", "hf", "http", "https", "memory",
    "oci", "oss", "r2", "s3", "s3a", "sftp", "ssh", "webhdfs",
)  # fmt: skip
"""Protocols whose name before a colon is taken for a mistyped URL, not for a folder's name."""


def is_remote(location: str) -> bool:
    """Return whether a location in normal form is a URL, not a local path."""
    return "://" in location


def normalized(location: str) -> str:
    """Return the normal form of a path or URL, so that one place has one spelling.

    Local paths: `file://` is removed, `~` and `~user` become home directories, repeated and
    trailing slashes are removed. `..` is kept, since removing it would change the meaning of a
    path through a symbolic link. URLs of stores: the protocol is in lower case; repeated and
    trailing slashes are removed.

    Raises:
        ValueError: the location looks like a URL but is none, such as `s3:/bucket`, or contains
            `.` or `..` behind a bucket, or `~` of an unknown user. The text gives the right form.
    """
    if location.lower().startswith("file:"):
        return _local_url(location)
    if matched := _URL.fullmatch(location):
        protocol, rest = matched.groups()
        if protocol.lower() in ("http", "https"):
            return location  # a server may give repeated slashes a meaning
        host, *parts = rest.split("/")
        keys = [part for part in parts if part]
        if "." in keys or ".." in keys:
            raise ValueError(f"{location!r} contains . or .., which are not folders in a bucket")
        return f"{protocol.lower()}://" + "/".join([host, *keys])
    protocol, colon, rest = location.partition(":")
    mistyped = _ONE_SLASH.fullmatch(location) is not None
    if colon and (mistyped or protocol.lower() in _PROTOCOLS):
        url = f"{protocol.lower()}://{rest.lstrip('/')}"
        raise ValueError(
            f"{location!r} looks like a URL but is not one; write {url}, or ./{location} for a "
            "local path"
        )
    return _local(location)


def _local_url(location: str) -> str:
    path = location[len("file:") :]
    if path.startswith("//localhost/"):
        path = path.removeprefix("//localhost")
    elif path.startswith("//"):
        path = path[2:]
    return _local(path)


def _local(path: str) -> str:
    if path.startswith("~"):
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            user = path.partition("/")[0]
            raise ValueError(f"{path!r}: no home directory of {user}; write ./{path} for a folder")
        path = expanded
    if not path:
        return path
    root = "/" if path.startswith("/") else ""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return root + "/".join(parts) or "."
