"""Faults between the client and a real S3 server: transient ones are retried, others raised."""

import os
import subprocess
import sys
import uuid

import pytest
import torch
from support.faulty_stores import put
from support.s3_proxy import Fault, Proxy

from scripts.s3_server import BUCKET
from trainer import checkpoint
from trainer.checkpoint import Content, lineage
from trainer.checkpoint.commit import UnconfirmedError, commit
from trainer.cluster.world import World
from trainer.config.schema import ObjectStore
from trainer.errors import FAILURE, RUN_AGAIN, StoreError, StoreRefusedError
from trainer.storage import AlreadyExists, open_store

BIG = os.urandom(1 << 20) * 20 + b"end"


@pytest.fixture
def proxy(s3):
    http_proxy = Proxy(s3.endpoint)
    yield http_proxy
    http_proxy.close()


@pytest.fixture
def store(proxy):
    settings = ObjectStore(endpoint_url=proxy.endpoint, timeout_s=2.0, retries=4)
    return open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}/x", settings)


TRANSIENT = {
    "slow down": Fault("answer", 2),
    "internal error": Fault("answer", 2, status=500, code="InternalError"),
    "reset": Fault("reset"),
    "no answer in time": Fault("delay"),
    "token expired, and there is a new one": Fault(
        "answer", path="made", status=400, code="ExpiredToken"
    ),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "DELETE", "POST"])
def test_transient_faults_are_retried(store, proxy, fault, method):
    proxy.faults = [
        Fault(fault.how, fault.times, method, fault.path, status=fault.status, code=fault.code)
    ]
    put(store, "big", BIG)
    store.create("made", b"mine")
    store.replace("made", b"mine too")
    assert store.read("made") == b"mine too"
    assert store.list("") == ["big", "made"]
    assert store.size("big") == len(BIG)
    assert store.read("big") == BIG
    store.delete(["made"])
    assert store.list("", unfinished=True) == ["big"]
    assert proxy.faults[0].met > 0 or (fault.path and method == "POST")


@pytest.mark.parametrize("path", ["uploads", "partNumber=1"])
def test_token_that_expires_in_an_upload_is_renewed_before_the_first_part_only(store, proxy, path):
    proxy.faults = [Fault("answer", 1, path=path, status=400, code="ExpiredToken")]
    if path == "uploads":
        put(store, "big", BIG)
    else:
        with pytest.raises(StoreError, match=r"ExpiredToken.*get new credentials") as caught:
            put(store, "big", BIG)
        assert caught.value.exit_code == RUN_AGAIN
    assert proxy.faults[0].met == 1
    assert store.list("", unfinished=True) == (["big"] if path == "uploads" else [])


def test_truncated_response_is_requested_again(store, proxy):
    put(store, "big", BIG)
    proxy.faults = [Fault("cut", 2, "GET", "big")]
    buffer = bytearray(len(BIG))
    assert store.read_into("big", 0, memoryview(buffer)) == len(BIG)
    assert buffer == BIG
    assert proxy.faults[0].met == 2


def test_corrupted_upload_is_sent_again_and_that_of_a_part_fails_the_write(store, proxy):
    proxy.faults = [Fault("spoil", 1, "PUT", "partNumber"), Fault("spoil", 2, "PUT", "small")]
    with pytest.raises(StoreError, match="BadDigest") as caught:
        put(store, "big", BIG)
    assert caught.value.exit_code == RUN_AGAIN
    put(store, "small", b"some bytes")
    assert store.read("small") == b"some bytes"
    assert [fault.met for fault in proxy.faults] == [1, 2]
    assert store.list("", unfinished=True) == ["small"]
    put(store, "big", BIG)
    assert store.read("big") == BIG


def test_create_with_lost_response_succeeds_for_own_bytes_only(store, proxy):
    proxy.faults = [Fault("reset", 1, "PUT")]
    store.create("made", b"mine")
    with pytest.raises(AlreadyExists):
        store.create("made", b"theirs")
    assert store.read("made") == b"mine"


PERMANENT = {
    ("AccessDenied", 403): "check the permissions",
    ("RequestTimeTooSkewed", 403): "set the clock",
    ("SignatureDoesNotMatch", 403): "check the credentials",
    ("NoSuchBucket", 404): "create the bucket",
}


@pytest.mark.parametrize(("error", "advice"), PERMANENT.items(), ids=lambda value: str(value))
def test_permanent_error_is_raised_with_advice(store, proxy, error, advice):
    put(store, "a", b"x")
    proxy.faults = [Fault("answer", -1, status=error[1], code=error[0])]
    for call in (
        lambda: store.read("a"),
        lambda: store.replace("a", b"y"),
        lambda: store.create("b", b"y"),
        lambda: store.list(""),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(StoreError, match=advice):
            call()
    proxy.faults = []
    assert store.read("a") == b"x"


REFUSALS = {
    "400": Fault("answer", -1, status=400, code="InvalidArgument"),
    "403": Fault("answer", -1, status=403, code="AccessDenied"),
    "405": Fault("answer", -1, status=405, code="MethodNotAllowed"),
}


@pytest.mark.parametrize("fault", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD", "DELETE", "POST"])
def test_permanent_refusal_of_any_request_has_exit_code_1(store, proxy, fault, method):
    put(store, "old", b"x")
    proxy.faults = [Fault("answer", -1, method, status=fault.status, code=fault.code)]
    calls = {
        "PUT": lambda: store.replace("a", b"y"), "GET": lambda: store.list(""),
        "HEAD": lambda: store.size("old"), "DELETE": lambda: store.delete(["old"]),
        "POST": lambda: put(store, "big", BIG),
    }  # fmt: skip
    with pytest.raises(StoreRefusedError) as caught:
        calls[method]()
    assert caught.value.exit_code == FAILURE


@pytest.mark.parametrize("fault", [
    Fault("answer", -1), Fault("reset", -1),
    Fault("answer", -1, status=400, code="ExpiredToken"),
], ids=["503", "reset", "expired"])  # fmt: skip
def test_fault_that_may_pass_has_exit_code_75(store, proxy, fault):
    proxy.faults = [fault]
    for call in (lambda: store.replace("a", b"y"), lambda: store.size("a"), store.probe):
        with pytest.raises(StoreError) as caught:
            call()
        assert caught.value.exit_code == RUN_AGAIN


def test_commit_rejected_by_the_server_raises_with_exit_code_1(store, proxy):
    proxy.faults = [Fault("answer", -1, "PUT", "manifest.json", status=403, code="AccessDenied")]
    with pytest.raises(StoreRefusedError) as caught:
        commit(store, "checkpoints/step-00000001.0001", b"{}")
    assert isinstance(caught.value, UnconfirmedError)  # its shards are kept


@pytest.mark.parametrize(("method", "path"), [("POST", "uploads"), ("PUT", "partNumber")])
def test_probe_writes_as_a_save_and_leaves_nothing(store, proxy, method, path):
    store.probe()
    assert store.list("", unfinished=True) == []
    fault = Fault("answer", -1, method, path, status=400, code="InvalidArgument")
    proxy.faults = [fault]
    with pytest.raises(StoreRefusedError, match="would reject it again"):
        store.probe()
    assert fault.met > 0
    proxy.faults = []
    assert store.list("", unfinished=True) == []


def test_write_fails_after_last_retry_and_leaves_no_part(store, proxy):
    proxy.faults = [Fault("answer", -1, "PUT", "partNumber=2")]
    with pytest.raises(StoreError, match=r"cannot write .*SlowDown.*5 tries"):
        put(store, "big", BIG)
    assert proxy.faults[0].met == 5
    assert store.list("", unfinished=True) == []


def test_write_whose_parts_fail_raises_their_error_and_leaves_nothing(store, proxy):
    class SourceError(Exception):
        pass

    def parts():
        yield BIG[: store.part_bytes]
        yield BIG[: store.part_bytes]
        raise SourceError

    with pytest.raises(SourceError):
        store.write("big", len(BIG), parts())
    assert store.list("", unfinished=True) == []


def test_upload_that_could_not_be_aborted_is_aborted_by_the_failed_write(store, proxy):
    proxy.faults = [
        Fault("answer", -1, "PUT", "partNumber=2", status=403, code="AccessDenied"),
        Fault("answer", 5, "DELETE", "uploadId"),
    ]
    with pytest.raises(StoreError):
        put(store, "big", BIG)
    assert proxy.faults[1].met == 5
    assert store.list("", unfinished=True) == []


def test_upload_of_a_killed_writer_is_listed_and_deleted(store, s3, tmp_path):
    program = (
        "import os, sys\n"
        "from trainer.storage import open_store\n"
        "def parts():\n"
        "    for _ in range(3):\n"
        "        yield bytes(8 << 20)\n"
        "    os.kill(os.getpid(), 9)\n"
        "open_store(sys.argv[1]).write('folder/big', 64 << 20, parts())\n"
    )
    assert subprocess.run([sys.executable, "-c", program, store.url]).returncode == -9
    assert store.list("") == []
    assert store.list("", unfinished=True) == ["folder/big"]
    store.delete(["folder/other", "folder/big"])
    assert store.list("", unfinished=True) == []


def test_transient_bit_flip_is_reread_and_persistent_one_is_damage(store, proxy):
    attempt = lineage.begin(store, {})
    state = {"model.w": torch.arange(3_000_000, dtype=torch.float32)}
    writer = checkpoint.Writer(store, World(), attempt)
    manifest = checkpoint.save(writer, Content(tensors=state), step=1)
    target = torch.zeros(3_000_000)
    proxy.faults = [Fault("alter", 1, "GET", "safetensors")]
    checkpoint.load(store, manifest, {"model.w": target})
    assert torch.equal(target, state["model.w"])
    assert proxy.faults[0].met == 1
    proxy.faults = [Fault("alter", -1, "GET", "safetensors")]
    with pytest.raises(checkpoint.DamagedError):
        checkpoint.load(store, manifest, {"model.w": target})


def test_load_from_deleted_bucket_raises_store_error(store, proxy):
    attempt = lineage.begin(store, {})
    state = {"model.w": torch.arange(10, dtype=torch.float32)}
    writer = checkpoint.Writer(store, World(), attempt)
    manifest = checkpoint.save(writer, Content(tensors=state), step=1)
    proxy.faults = [Fault("answer", -1, status=404, code="NoSuchBucket")]
    with pytest.raises(StoreError, match="create the bucket"):
        checkpoint.load(store, manifest, {"model.w": torch.zeros(10)})


def test_server_without_conditional_create_is_reported_and_create_still_checks(store, proxy):
    assert store.probe() == ""
    proxy.faults = [Fault("answer", -1, header="If-None-Match", status=501, code="NotImplemented")]
    assert "does not support conditional create" in store.probe()
    store.create("made", b"mine")
    store.create("made", b"mine")
    with pytest.raises(AlreadyExists):
        store.create("made", b"theirs")
    assert store.read("made") == b"mine"
    assert store.list("") == ["made"]


def test_delete_works_without_permission_to_list_uploads(store, proxy):
    store.create("a", b"x")
    proxy.faults = [Fault("answer", -1, path="uploads", status=403, code="AccessDenied")]
    store.delete(["a"])
    assert store.list("", unfinished=True) == []
    assert proxy.faults[0].met > 0
