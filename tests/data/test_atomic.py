"""A file appears whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from survfuse.data.atomic import atomic_path


def test_the_file_appears_at_the_end(tmp_path):
    target = tmp_path / "out.bin"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_permissions_are_those_of_a_plain_file(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "out.bin") as temporary:
        temporary.write_bytes(b"new")
    modes = {os.stat(path).st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_missing_folder_is_named(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"),
        atomic_path(tmp_path / "nowhere" / "out.bin"),
    ):
        pass


def test_what_the_system_refuses_names_the_file_that_was_asked_for(tmp_path):
    def full() -> None:
        with atomic_path(tmp_path / "out.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        full()
    assert caught.value.filename == str(tmp_path / "out.bin")
    # an error of another file keeps its name
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "out.bin"):
        (tmp_path / "other").read_bytes()
    assert caught.value.filename == str(tmp_path / "other")
    with pytest.raises(IsADirectoryError) as caught, atomic_path(tmp_path):
        pass
    assert caught.value.filename == str(tmp_path)
