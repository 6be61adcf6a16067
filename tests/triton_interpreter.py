"""Triton's interpreter without work that changes nothing, which is two thirds of its time."""

import dataclasses
import functools
from types import SimpleNamespace

import triton.language as tl
from triton.runtime import interpreter


def hasten():
    # a launch makes all of the language's builtins run in numpy; calls within the kernel need not do it again
    rewrite_builtins = interpreter._patch_lang
    language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda kernel: rewrite_builtins(language)
    interpreter.InterpretedFunction.__call__ = lambda self, *arguments, **options: self.rewrite()(*arguments, **options)

    # its table of dtypes is made anew in each call
    numpy_dtype = interpreter._get_np_dtype
    of_number = functools.cache(numpy_dtype)
    interpreter._get_np_dtype = lambda of: numpy_dtype(of) if of.scalar.is_ptr() else of_number(of.scalar)

    # without debug=True nobody is told of an overflow
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
