"""Files that appear complete or not at all."""

import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.core.atomic_file import apply_umask, atomic_file


@pytest.mark.parametrize("durable", [True, False])
def test_atomic_file_replaces_the_file_after_the_block(tmp_path, durable):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path, durable=durable) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_file_keeps_the_old_file_after_an_exception(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail():
        with atomic_file(path, durable=True) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


MODES = st.integers(0, 0o777)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(umask=MODES, modes=st.lists(MODES, max_size=3))
def test_apply_umask_gives_files_the_permissions_of_new_ones(tmp_path, umask, modes):
    paths = [tmp_path / str(index) for index in range(len(modes))]
    for path, mode in zip(paths, modes, strict=True):
        path.touch()
        path.chmod(mode)
    before = os.umask(umask)
    try:
        apply_umask(paths)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o666 & ~umask] * len(paths)
    assert {path.name for path in tmp_path.iterdir()} >= {path.name for path in paths}
    assert not list(tmp_path.glob(".tmp-*"))
