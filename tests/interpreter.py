"""Triton's interpreter without what it does for nothing: more than half of its time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """Leave out what changes no result.

    For every call of a device function the interpreter looks through `triton.language` and replaces
    what it finds there by its own: here once in a launch. For every value it makes a table of all
    types, and its shape anew: here they are kept. For every sum of integers it looks whether it
    fits, and unless told to debug does nothing with the answer: here it does not look.
    """
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    numpy_type, make_tensor = interpreter._get_np_dtype, tl.tensor.__init__
    make_block = tl.block_type.__init__
    tensors: dict[str, tuple] = {}
    blocks: dict[tuple[str, tuple[int, ...]], tuple] = {}
    replaced: set[frozenset[str]] = set()
    numpy_types: dict[str, np.dtype] = {}

    def fresh_launch(self: object, *arguments: object, **options: object) -> None:
        replaced.clear()
        launch(self, *arguments, **options)

    def call(self: interpreter.InterpretedFunction, *arguments: object, **options: object):
        languages = languages_of(self.fn)
        if languages not in replaced:
            patch(self.fn)
            replaced.add(languages)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def kept_numpy_type(kind: tl.dtype) -> np.dtype:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        if isinstance(kind, tl.pointer_type):
            return numpy_type(kind)
        if kind.name not in numpy_types:
            numpy_types[kind.name] = numpy_type(kind)
        return numpy_types[kind.name]

    def tensor_of_kept_shape(self: tl.tensor, handle: object, kind: tl.dtype) -> None:
        kept = tensors.get(kind.name)
        if kept is None:
            make_tensor(self, handle, kind)
            tensors[kind.name] = (self.shape, self.numel)
        else:
            self.handle, self.type, self.dtype = handle, kind, kind.scalar
            self.shape, self.numel = kept

    def block_of_kept_shape(self: tl.block_type, element: tl.dtype, shape: Iterable) -> None:
        sizes = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
        kept = blocks.get((element.name, sizes))
        if kept is None:
            make_block(self, element, shape)
            blocks[element.name, sizes] = (self.shape, self.numel, self.name)
        else:
            self.element_ty = element
            self.shape, self.numel, self.name = kept

    tl.tensor.__init__ = tensor_of_kept_shape
    tl.block_type.__init__ = block_of_kept_shape
    interpreter.GridExecutor.__call__ = fresh_launch
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = kept_numpy_type
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


@functools.cache
def languages_of(function: Callable) -> frozenset[str]:
    """Which of the modules that the interpreter changes a function sees."""
    modules = (value for value in function.__globals__.values() if inspect.ismodule(value))
    return frozenset(module.__name__ for module in modules if module in (tl, tl.core))
