"""Connection to S3: address, credentials and certificates as botocore finds them, and uploads.

obstore reads neither profiles nor single sign-on, and does not list multipart uploads. Those of
killed processes cost money until they are aborted.
"""

import ipaddress
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError

_CREDENTIALS_S = 60
"""Seconds after which the source of the credentials is read again."""
_KEY_OPTIONS = {
    "aws_access_key_id": ("access_key_id", "aws_access_key_id"),
    "aws_secret_access_key": ("secret_access_key", "aws_secret_access_key"),
    "aws_session_token": ("session_token", "aws_session_token", "token", "aws_token"),
}
"""Names of credentials in botocore, and in store.options."""


@dataclass(frozen=True)
class Connection:
    """Address, options and credentials of a bucket.

    Args:
        session: botocore's session.
        endpoint: URL of the server, without the bucket; None: Amazon's.
        region: region of the bucket.
        config: the options of obstore's S3Store.
        credentials: called for each request that needs new ones; None: obstore has them.
    """

    session: Any
    endpoint: str | None
    region: str
    config: dict[str, Any]
    credentials: "Credentials | None"


def connection(url: str, bucket: str, settings: ObjectStore) -> Connection:
    """Read settings, environment and profile.

    Raises:
        ConfigError: the profile or a certificate file does not exist, or botocore is missing.
    """
    try:
        import botocore.session
        from botocore.configprovider import ConfiguredEndpointProvider
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ConfigError(f"{url}: {error}; pip install 'perdure[s3]'") from None
    session = botocore.session.Session()
    try:
        profile = session.get_scoped_config()
        region = session.get_config_variable("region")
        bundle = session.get_config_variable("ca_bundle")
        checksums = session.get_config_variable("request_checksum_calculation") or ""
        configured = ConfiguredEndpointProvider(session.full_config, profile, "s3").provide()
    except BotoCoreError as error:
        raise ConfigError(f"{url}: {error}; correct AWS_PROFILE or the files in ~/.aws") from None
    endpoint = settings.endpoint_url or configured
    region = settings.region or os.environ.get("AWS_REGION") or region or "us-east-1"
    of_profile = profile.get("s3")
    style = of_profile.get("addressing_style") if isinstance(of_profile, Mapping) else None
    is_virtual = not settings.path_style and style != "path" and _has_own_host(bucket, endpoint)
    config: dict[str, Any] = {
        "region": region,
        "virtual_hosted_style_request": is_virtual,
        "disable_bulk_delete": True,  # keys are deleted in order, and not every server has it
    }
    if endpoint:
        scheme, _, host = endpoint.rstrip("/").partition("://")
        address = f"{scheme}://{bucket}.{host}" if is_virtual else f"{scheme}://{host}"
        config |= {"endpoint": address, "aws_endpoint_url_s3": address}
        config["allow_http"] = scheme == "http"
    if checksums.lower() != "when_required":
        config["checksum_algorithm"] = "SHA256"  # the signature contains it anyway
    if bundle:
        config["root_certificate"] = _certificates(url, bundle)
    names = {name for names in _KEY_OPTIONS.values() for name in names} | {"skip_signature"}
    has_keys = bool(names & settings.options.keys())
    return Connection(session, endpoint, region, config, None if has_keys else Credentials(session))


def _has_own_host(bucket: str, endpoint: str | None) -> bool:
    """Return whether the bucket can be a part of the server's name: not of an address."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", bucket):
        return False
    host = (urlsplit(endpoint).hostname if endpoint else None) or "s3.amazonaws.com"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." in host
    return False


def _certificates(url: str, bundle: str) -> str:
    try:
        return Path(bundle).expanduser().read_text()
    except OSError as error:
        raise ConfigError(
            f"{url}: cannot read the certificates in {bundle}: {error.strerror}; correct "
            "AWS_CA_BUNDLE"
        ) from None


class Credentials:
    """Provider of credentials for obstore: environment, profile, single sign-on, roles.

    botocore refreshes temporary ones. Files are read again, since other programs renew them.
    """

    refresh_threshold = timedelta(0)
    """Remaining life of credentials at which obstore asks again."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._credentials: Any = None

    def __call__(self) -> dict[str, Any]:
        """Return credentials for the next minute.

        Raises:
            NoCredentialsError: there are none.
        """
        from botocore.credentials import RefreshableCredentials
        from botocore.exceptions import NoCredentialsError
        from botocore.session import Session

        if not isinstance(self._credentials, RefreshableCredentials):
            if self._credentials is not None:
                self._session = Session()
            self._credentials = self._session.get_credentials()
        if self._credentials is None:
            raise NoCredentialsError
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_S),
        }


class Uploads:
    """Incomplete multipart uploads of a bucket, listed and aborted through botocore.

    Args:
        connection: address and credentials of the bucket.
        bucket: its name.
        settings: timeouts and credentials.
    """

    def __init__(self, connection: Connection, bucket: str, settings: ObjectStore) -> None:
        self._connection, self._bucket, self._settings = connection, bucket, settings
        self._making = threading.Lock()
        self._botocore: Any = None

    def below(self, prefix: str) -> list[tuple[str, str]]:
        """Return path and id of the uploads whose path starts with `prefix`.

        Without the permission to list them, none: they remain.
        """
        uploads: list[tuple[str, str]] = []
        more: dict[str, str] = {}
        while True:
            page = self._page(prefix, more)
            uploads += [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return uploads
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _page(self, prefix: str, more: Mapping[str, str]) -> Mapping[str, Any]:
        from botocore.exceptions import ClientError

        try:
            page: Mapping[str, Any] = self._client().list_multipart_uploads(
                Bucket=self._bucket, Prefix=prefix, **more
            )
        except ClientError as error:
            if error.response["Error"]["Code"] in ("AccessDenied", "NotImplemented", "403", "501"):
                return {}
            raise
        return page

    def abort(self, path: str, upload: str) -> None:
        """Abort an upload, so that its parts are deleted.

        Raises:
            FileNotFoundError: it does not exist any more.
        """
        from botocore.exceptions import ClientError

        try:
            self._client().abort_multipart_upload(Bucket=self._bucket, Key=path, UploadId=upload)
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchUpload":
                raise FileNotFoundError(path) from None
            raise

    def _client(self) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        with self._making:
            if self._botocore is None:
                options = self._settings.options
                is_unsigned = options.get("skip_signature")
                is_virtual = self._connection.config["virtual_hosted_style_request"]
                config = Config(
                    connect_timeout=10.0,
                    read_timeout=self._settings.timeout_s,
                    retries={"total_max_attempts": 1},  # the store retries
                    s3={"addressing_style": "virtual" if is_virtual else "path"},
                    signature_version=UNSIGNED if is_unsigned else "s3v4",
                )
                self._botocore = self._connection.session.create_client(
                    "s3", region_name=self._connection.region,
                    endpoint_url=self._connection.endpoint, config=config,
                    **_keys(options, _KEY_OPTIONS),
                )  # fmt: skip
            return self._botocore


def _keys(options: Mapping[str, Any], names: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """Return the credentials among the options, by their names in botocore."""
    keys = {}
    for name, spellings in names.items():
        for spelling in spellings:
            if spelling in options:
                keys[name] = options[spelling]
    return keys
