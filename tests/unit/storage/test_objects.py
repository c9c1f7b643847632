"""Connections to buckets: addresses, credentials, options, processes. Nothing is sent."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.schema import ObjectStore
from trainer.errors import ConfigError, StoreRefusedError
from trainer.storage import open_store, s3


@pytest.fixture(autouse=True)
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leave only the files of this folder, and no variables."""
    for name in os.environ:
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


def config(url: str = "s3://bucket/a", **settings) -> dict:
    return dict(open_store(url, ObjectStore(**settings))._clients.once.config)


ADDRESSES = {
    "amazon": ({}, {}, None, True),
    "setting": ({"endpoint_url": "https://host.org:9"}, {}, "https://bucket.host.org:9", True),
    "path style": (
        {"endpoint_url": "https://host.org", "path_style": True}, {}, "https://host.org", False,
    ),
    "address": ({"endpoint_url": "http://10.0.0.1:9000"}, {}, "http://10.0.0.1:9000", False),
    "short name": ({"endpoint_url": "http://minio:9000/"}, {}, "http://minio:9000", False),
    "variable": ({}, {"AWS_ENDPOINT_URL": "http://localhost:1"}, "http://localhost:1", False),
    "s3 variable": (
        {}, {"AWS_ENDPOINT_URL": "http://localhost:1", "AWS_ENDPOINT_URL_S3": "http://localhost:2"},
        "http://localhost:2", False,
    ),
    "setting before variable": (
        {"endpoint_url": "http://localhost:3"}, {"AWS_ENDPOINT_URL_S3": "http://localhost:2"},
        "http://localhost:3", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "variables", "endpoint", "is_virtual"), ADDRESSES.values(), ids=ADDRESSES
)
def test_address_is_that_of_settings_or_environment(
    monkeypatch, settings, variables, endpoint, is_virtual
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    values = config(**settings)
    assert values.get("endpoint") == values.get("endpoint_url_s3") == endpoint
    assert values["virtual_hosted_style_request"] == str(is_virtual).lower()


def test_profile_has_region_endpoint_and_path_style(aws, monkeypatch):
    (aws / "config").write_text(
        "[profile mine]\nregion = eu-west-9\nendpoint_url = https://mine.org\n"
        "s3 =\n  addressing_style = path\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    values = config()
    assert values["region"] == "eu-west-9"
    assert values["endpoint"] == "https://mine.org"
    assert values["virtual_hosted_style_request"] == "false"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "of-default")
    assert config()["region"] == "of-default"
    monkeypatch.setenv("AWS_REGION", "of-variable")
    assert config()["region"] == "of-variable"
    assert config(region="of-setting")["region"] == "of-setting"


@pytest.mark.parametrize(("value", "expected"), [("", "SHA256"), ("when_required", None)])
def test_checksums_are_sent_unless_only_where_required(monkeypatch, value, expected):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", value or "when_supported")
    assert (config().get("checksum_algorithm") or "").upper() == (expected or "")


def test_unknown_profile_and_missing_certificates_are_configuration_errors(monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/absent.pem")
    with pytest.raises(ConfigError, match=r"/absent.pem.*AWS_CA_BUNDLE"):
        open_store("s3://bucket/a")
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(ConfigError, match=r"absent.*AWS_PROFILE"):
        open_store("s3://bucket/a")


OPTIONS = {
    ("s3://b", "color"): "store.options.color is not an option of obstore",
    ("s3://b", "key"): "write store.options.access_key_id",
    ("gs://b", "color"): "store.options.color is not an option of obstore",
    ("az://b", "color"): "store.options.color is not an option of obstore",
    ("s3://b", "allow_http"): "failed to parse",
}


@pytest.mark.parametrize(("option", "text"), OPTIONS.items(), ids=str)
def test_unknown_option_is_a_configuration_error_without_its_value(monkeypatch, option, text):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    url, name = option
    with pytest.raises(ConfigError, match=text) as caught:
        open_store(f"{url}/a", ObjectStore(options={name: "secret-value"}))
    assert "secret-value" not in str(caught.value)


def test_options_of_the_client_and_of_the_store_are_accepted():
    values = config(
        options={"user_agent": "mine", "request_payer": True, "pool_idle_timeout": "3s"}
    )
    assert values["request_payer"]


def test_missing_credentials_are_named_in_the_error():
    store = open_store("s3://bucket/a", ObjectStore(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(StoreRefusedError, match="Unable to locate credentials; set AWS_ACCESS"):
        store.read("x")


def test_unreachable_server_is_named_with_its_cause(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    settings = ObjectStore(endpoint_url="http://127.0.0.1:9", retries=1)
    with pytest.raises(
        Exception,
        match=r"cannot read s3://bucket/a/x: .*Connection re.* \(2 tries in .*network",
    ):
        open_store("s3://bucket/a", settings).read("x")


def test_rewritten_credentials_file_is_read_again(aws):
    def write(key: str) -> None:
        (aws / "credentials").write_text(
            f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n"
            f"aws_session_token = of-{key}\n"
        )

    write("one")
    credentials = s3.connection("s3://b", "bucket", ObjectStore()).credentials
    assert credentials()["token"] == "of-one"
    write("two")
    assert credentials()["access_key_id"] == "two"
    assert credentials()["token"] == "of-two"


def test_temporary_credentials_of_a_profile_are_refreshed_before_they_expire(aws, monkeypatch):
    program = aws / "process"
    program.write_text(
        f"#!{sys.executable}\nimport datetime, json, pathlib\n"
        f"path = pathlib.Path({str(aws / 'calls')!r})\n"
        "count = int(path.read_text()) + 1 if path.exists() else 1\n"
        "path.write_text(str(count))\n"
        "until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(\n"
        "    seconds=30 if count == 1 else 3600)\n"
        "print(json.dumps(dict(Version=1, AccessKeyId=f'key-{count}', SecretAccessKey='s',\n"
        "    SessionToken='t', Expiration=until.isoformat())))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    (aws / "config").write_text(f"[profile mine]\ncredential_process = {program}\n")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    credentials = s3.connection("s3://b", "bucket", ObjectStore()).credentials
    keys = [credentials()["access_key_id"] for _ in range(4)]
    assert keys[-2:] == ["key-2", "key-2"]
    assert (aws / "calls").read_text() == "2"


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_libraries_are_imported_only_for_a_bucket(tmp_path):
    done = run(
        "import sys\nfrom trainer.storage import open_store\n"
        f"open_store({str(tmp_path)!r}).create('a', b'x')\n"
        "print(sorted({'obstore', 'botocore', 'fsspec'} & sys.modules.keys()))\n"
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(("url", "extra"), [
    ("s3://b/a", "perdure[s3]"), ("gs://b/a", "perdure[gcs]"), ("az://b/a", "perdure[azure]"),
])  # fmt: skip
def test_missing_library_is_an_error_that_names_the_extra(url, extra):
    done = run(
        "import sys\nfor name in ('obstore', 'gcsfs', 'adlfs'):\n    sys.modules[name] = None\n"
        "from trainer.errors import ConfigError\nfrom trainer.storage import open_store\n"
        f"try:\n    open_store({url!r})\nexcept ConfigError as error:\n    print(error)\n"
    )
    assert f"pip install '{extra}'" in done.stdout, done.stderr


def test_store_in_a_forked_process_raises_and_does_not_hang():
    done = run(
        "import os\nfrom trainer.config.schema import ObjectStore\n"
        "from trainer.errors import StoreError\nfrom trainer.storage import open_store\n"
        "settings = ObjectStore(endpoint_url='http://127.0.0.1:9', retries=0)\n"
        "store = open_store('s3://bucket/a', settings)\n"
        "def read():\n"
        "    try:\n        store.read('x')\n"
        "    except StoreError as error:\n        print(error, flush=True)\n"
        "def fork():\n"
        "    if not (child := os.fork()):\n        read()\n        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "fork()\nread()\nfork()\n",
        AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b",
    )  # fmt: skip
    before, parent, after = done.stdout.splitlines()
    assert "error sending request" in before
    assert "error sending request" in parent
    assert "forked" in after
    assert "spawn" in after
