"""FLOP formulas of the ops, handed to torch's counter when somebody imports it.

`torch.utils.flop_counter` imports Triton wherever that is installed. A program that counts nothing
should not pay for it, so formulas wait here until the counter is there.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[object, Callable]] = []


def flop_formula(op: object) -> Callable[[Callable], Callable]:
    """Decorator: count calls of `op` by a function of its arguments' shapes."""

    def register(formula: Callable) -> Callable:
        counter = sys.modules.get(_COUNTER)
        if counter is None:
            _waiting.append((op, formula))
        else:
            counter.register_flop_formula(op)(formula)
        return formula

    return register


class _CounterFinder(importlib.abc.MetaPathFinder):
    """Finds torch's counter as anybody would, and registers the formulas once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module) -> None:
            run(module)
            for op, formula in _waiting:
                module.register_flop_formula(op)(formula)
            _waiting.clear()

        spec.loader.exec_module = run_and_register
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _CounterFinder())
