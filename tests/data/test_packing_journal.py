"""A store in the making: the journal of an unfinished one, and what its bytes depend on."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from survfuse.data import packing


def test_two_processes_do_not_write_one_store(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 8), dtype=np.float32))
    journal = packing._Journal(tmp_path / ".out.h5.journal")
    with pytest.raises(BlockingIOError, match="another process is packing this store"):
        packing.pack(tmp_path / "a.npy", tmp_path / "out.h5")
    journal.close(keep=False)
    packing.pack(tmp_path / "a.npy", tmp_path / "out.h5")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no full device")
def test_a_journal_without_room_says_so_once() -> None:
    journal = packing._Journal(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        journal.add("a.h5", 1)
    # closing must not try again: its error would hide the one that says what was kept
    journal.close(keep=True)


def test_the_same_bags_give_the_same_bytes_a_second_later(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 8), dtype=np.float32))
    packing.pack(tmp_path / "a.npy", tmp_path / "now.h5")
    time.sleep(1.1)
    packing.pack(tmp_path / "a.npy", tmp_path / "later.h5")
    assert (tmp_path / "now.h5").read_bytes() == (tmp_path / "later.h5").read_bytes()
