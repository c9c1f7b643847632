"""Contract tests for every kind of store: import all of them next to a fixture `store`."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faulty_stores import put

from trainer.storage import AlreadyExists, Store, local_path


def is_untouched(store: Store) -> bool:
    return store.list("") == [] if (path := local_path(store.url)) is None else not path.exists()


def in_threads(count: int, do: Callable[[int], object]) -> list[object]:
    """Call `do` in threads that start together; return what each returned or raised."""
    barrier = Barrier(count)

    def one(number: int) -> object:
        barrier.wait()
        try:
            return do(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_store_reads_back_written_bytes(store):
    put(store, "a/b/c.bin", b"onetwothree")
    assert store.read("a/b/c.bin") == b"onetwothree"
    assert store.size("a/b/c.bin") == 11


def test_store_distinguishes_empty_value_from_missing_key(store):
    put(store, "empty", b"")
    assert store.read("empty") == b""
    assert store.size("empty") == 0
    with pytest.raises(FileNotFoundError):
        store.read("absent")


def test_write_writes_all_parts(store):
    data = os.urandom(1 << 20) * 17 + b"end"
    put(store, "big", data)
    assert store.read("big") == data


def test_write_of_existing_key_raises(store):
    put(store, "a", b"old")
    with pytest.raises(AlreadyExists, match="a"):
        put(store, "a", b"new")
    assert store.read("a") == b"old"


def test_create_makes_a_key_with_exactly_these_bytes(store):
    store.create("a/b", b"data")
    assert store.read("a/b") == b"data"
    assert store.list("") == ["a/b"]


def test_create_never_changes_what_is_there(store):
    store.create("a/b", b"mine")
    with pytest.raises(AlreadyExists, match="a/b"):
        store.create("a/b", b"theirs")
    with pytest.raises(AlreadyExists):
        store.create("a/b", b"")
    assert store.read("a/b") == b"mine"
    assert store.list("") == ["a/b"]


def test_create_is_a_success_where_its_own_bytes_are_there_already(store):
    store.create("a", b"mine")
    store.create("a", b"mine")
    assert store.read("a") == b"mine"


def test_create_concurrently_succeeds_once(store):
    for round_ in range(5):
        key = f"race/{round_}"
        outcomes = in_threads(8, lambda i, key=key: store.create(key, f"by {i}".encode() * 500))
        winners = [i for i, outcome in enumerate(outcomes) if outcome is None]
        losers = [outcome for outcome in outcomes if isinstance(outcome, AlreadyExists)]
        assert (len(winners), len(losers)) == (1, 7)
        assert store.read(key) == f"by {winners[0]}".encode() * 500
    assert store.list("") == [f"race/{round_}" for round_ in range(5)]


def test_replace_sets_a_key_whether_it_is_there_or_not(store):
    store.replace("a/b", b"first")
    assert store.read("a/b") == b"first"
    store.replace("a/b", b"2nd")
    assert store.read("a/b") == b"2nd"
    assert store.list("") == ["a/b"]


def test_replace_is_atomic_for_readers(store):
    values = [bytes([i]) * 300_000 for i in range(4)]
    store.replace("a", values[0])

    def work(number: int) -> set[bytes]:
        if number == 0:
            for value in values * 5:
                store.replace("a", value)
            return set()
        return {store.read("a") for _ in range(40)}

    for seen in in_threads(3, work):
        assert seen <= set(values), seen


def test_entries_are_what_lies_right_below_a_folder(store):
    for key in ("a/b/c", "a/b.x", "a/d", "a.x", "e"):
        put(store, key, b"1")
    assert store.entries("") == ["a.x", "a/", "e"]
    assert store.entries("a") == ["b.x", "b/", "d"]
    assert store.entries("a/b") == ["c"]
    assert store.entries("absent") == store.entries("e") == store.entries("a/b/c/d") == []


def test_modified_s_returns_time_of_last_write(store):
    before = time.time()
    store.replace("a", b"1")
    store.replace("b", b"1")
    assert before - 2 <= store.modified_s("a") <= store.modified_s("b") + 1 <= time.time() + 2
    with pytest.raises(FileNotFoundError):
        store.modified_s("absent")


RANGE_BYTES = bytes(range(256)) * 4


@given(start=st.integers(0, 1100), length=st.integers(0, 1100))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_read_into_fills_a_range_and_is_short_only_at_the_end(store, start, length):
    store.create("range", RANGE_BYTES)
    buffer = bytearray(b"\xaa" * length)
    count = store.read_into("range", start, memoryview(buffer))
    expected = RANGE_BYTES[start : start + length]
    assert count == len(expected)
    assert bytes(buffer) == expected + b"\xaa" * (length - count)


def test_read_into_reads_ranges_at_both_ends(store):
    put(store, "a", b"0123456789")
    buffer = bytearray(4)
    assert store.read_into("a", 0, memoryview(buffer)) == 4
    assert buffer == b"0123"
    assert store.read_into("a", 8, memoryview(buffer)) == 2
    assert buffer == b"8923"
    assert store.read_into("a", 10, memoryview(buffer)) == 0
    assert store.read_into("a", 99, memoryview(buffer)) == 0
    assert store.read_into("a", 3, memoryview(bytearray())) == 0


@pytest.mark.parametrize("method", ["read", "size"])
def test_read_methods_for_missing_key_raise_file_not_found(store, method):
    for key in ("absent", "absent/folder/key"):
        with pytest.raises(FileNotFoundError):
            getattr(store, method)(key)
        with pytest.raises(FileNotFoundError):
            store.read_into(key, 0, memoryview(bytearray(4)))


def test_list_gives_the_sorted_keys_below_a_folder(store):
    for key in ("b/2", "b/10", "a/x/y", "a.b", "c"):
        put(store, key, b"")
    assert store.list("") == ["a.b", "a/x/y", "b/10", "b/2", "c"]
    assert store.list("b") == ["b/10", "b/2"]
    assert store.list("a") == ["a/x/y"]
    assert store.list("a/x") == ["a/x/y"]
    assert store.list("nowhere") == []


def test_reads_of_missing_store_do_not_create_it(store):
    assert store.list("") == []
    assert store.list("checkpoints") == []
    assert is_untouched(store)


def test_delete_removes_only_its_keys(store):
    for key in ("a/1", "a/2", "b/1"):
        put(store, key, b"x")
    store.delete(["a/1", "b/1"])
    assert store.list("") == ["a/2"]
    with pytest.raises(FileNotFoundError):
        store.read("a/1")


def test_delete_ignores_missing_keys(store):
    store.delete([])
    store.delete(["absent", "missing/folder/key"])
    put(store, "a", b"x")
    store.delete(["a", "a"])
    assert store.list("") == []


def test_create_after_delete_succeeds(store):
    store.create("a/b", b"one")
    store.delete(["a/b"])
    store.create("a/b", b"two")
    assert store.read("a/b") == b"two"


OUTSIDE = ["../x", "/etc/passwd", "a/../../x", "..", "a/..", "/", "../x/y"]


@pytest.mark.parametrize("key", OUTSIDE)
def test_every_method_rejects_key_outside_the_store(store, key):
    for call in (
        lambda: put(store, key, b"x"),
        lambda: store.create(key, b"x"),
        lambda: store.replace(key, b"x"),
        lambda: store.read(key),
        lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        lambda: store.size(key),
        lambda: store.delete([key]),
        lambda: store.list(key),
    ):
        with pytest.raises(ValueError, match="is not a key"):
            call()
    assert is_untouched(store)


def test_probe_leaves_store_empty(store):
    store.probe()
    store.probe()
    assert store.list("") == []


def test_many_writers_of_one_new_folder_do_not_disturb_each_other(store):
    outcomes = in_threads(8, lambda i: put(store, f"new/folder/{i}", bytes([i])))
    assert outcomes == [None] * 8
    assert [store.read(f"new/folder/{i}") for i in range(8)] == [bytes([i]) for i in range(8)]
