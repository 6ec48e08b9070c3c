"""Triton's interpreter without work that it does again and again; what kernels compute is the same.

On every call of a device function it patches the whole of triton.language anew, which the launch of
the kernel has patched already, on every operation it builds a table of numpy's types, and of whole
numbers it computes whether they overflow, which it tells nobody unless it debugs: together most of
its time.
"""

from __future__ import annotations

import functools
import inspect

import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def make_quick() -> None:
    """Patch once a launch, look each type up once; nothing where a release has none of it."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None:

        @functools.cache
        def langs_of(fn):
            return {of for of in fn.__globals__.values() if inspect.ismodule(of)} & {tl, tl.core}

        def patch_once(fn):
            langs = langs_of(fn)
            if langs and all(lang.range.__name__ == "_new_range" for lang in langs):
                return interpreter._LangPatchScope()
            return patch(fn)

        interpreter._patch_lang = patch_once
    np_dtype = getattr(interpreter, "_get_np_dtype", None)
    if np_dtype is not None:
        of_element = functools.cache(np_dtype)

        def looked_up(dtype):
            element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
            return np_dtype(dtype) if isinstance(element, tl.pointer_type) else of_element(element)

        interpreter._get_np_dtype = looked_up
    checked = getattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", None)
    if checked is not None:

        def if_told(self, *operands):
            if self.builder.options.debug:
                checked(self, *operands)

        semantic.TritonSemantic.binary_op_sanitize_overflow_impl = if_told
