"""What tests of commands share: a call as a user makes it, and a run of a second."""

from __future__ import annotations

from typing import NoReturn

import pytest

from survfuse.cli import main

TINY = """
data:
  simulation: {n_train: 30, n_inner: 20, n_test: 20}
protocol: {min_inner_events: 2, n_bins: 2}
model: {name: mean_pool}
training: {epochs: 2, batch_size: 16}
evaluation: {bootstrap: 100}
"""


def call(*arguments: object) -> int:
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def interrupt(*_: object, **__: object) -> NoReturn:
    """Ctrl-C, in place of any function."""
    raise KeyboardInterrupt
