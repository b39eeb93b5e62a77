"""Import an optional library, or say which extra brings it."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, *, extra: str) -> ModuleType:
    """Return the module `name`.

    Args:
        name: the module to import, for example "h5py" or "matplotlib.pyplot".
        extra: the extra of survfuse that installs it.

    Raises:
        ImportError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise ImportError(f'needs {top}: pip install "survfuse[{extra}]"', name=top) from None
