"""Files that appear complete or not at all."""

import pytest

from trainer.core.atomic_file import atomic_file


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
