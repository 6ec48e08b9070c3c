"""Triton's interpreter without work that it does again and again; what kernels compute is the same.

On every call of a device function it patches the whole of triton.language anew, which the launch
of the kernel has patched already; on every operation it describes the result's shape, builds a
table of numpy's types, makes constants, and fits operands together that fit; and of whole numbers
it computes whether they overflow, which it tells nobody unless it debugs: together most of its
time.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter


def make_quick() -> None:
    """Each piece where it stands in the installed release, nothing where there is none of it."""
    for owner, name, quick in (
        (interpreter, "_patch_lang", patch_once),
        (interpreter, "_patch_attr", without_checks),
        (interpreter, "_get_np_dtype", looked_up),
        (semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", if_told),
        (semantic.TritonSemantic, "binary_op_type_checking_impl", unless_alike),
        (semantic.TritonSemantic, "scalar_constant", made_once),
        (tl.dtype, "__eq__", itself),
    ):
        given = getattr(owner, name, None)
        if given is not None:
            setattr(owner, name, quick(given))
    tl.block_type.__init__ = block_of
    tl.tensor.__init__ = tensor_of


def patch_once(given):
    """Patch once a launch."""

    @functools.cache
    def langs_of(fn):
        return {of for of in fn.__globals__.values() if inspect.ismodule(of)} & {tl, tl.core}

    def patch(fn):
        langs = langs_of(fn)
        if langs and all(lang.range.__name__ == "_new_range" for lang in langs):
            return interpreter._LangPatchScope()
        return given(fn)

    return patch


def without_checks(given):
    """Call what an operation wraps: that it is called from a kernel is known."""

    def patch(obj, name, member, builder, scope):
        function = inspect.unwrap(member)

        def called(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, called)

    return patch


def looked_up(given):
    """Look each type up once."""
    of_element = functools.cache(given)

    def look_up(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return given(dtype) if isinstance(element, tl.pointer_type) else of_element(element)

    return look_up


def if_told(given):
    """Look for overflows in debugging."""

    def check(self, *operands):
        if self.builder.options.debug:
            given(self, *operands)

    return check


def unless_alike(given):
    """Operands of one type and shape are left as they are, but in a quotient."""

    def check(self, left, right, *rules, **more):
        quotient = more or rules[3:]
        if isinstance(left, tl.tensor) and isinstance(right, tl.tensor) and not quotient:
            element = left.dtype
            shapes = [of.is_block() and of.shape for of in (left.type, right.type)]
            if element is right.dtype and shapes[0] is shapes[1] and not element.is_ptr():
                return left, right
        return given(self, left, right, *rules, **more)

    return check


def made_once(given):
    """A tensor for each constant of a type."""
    made = functools.cache(lambda self, kind, value, dtype: given(self, value, dtype))
    return lambda self, value, dtype: made(self, type(value), value, dtype)


def itself(given):
    """A type is itself."""
    return lambda self, other: self is other or given(self, other)


class Shape(NamedTuple):
    """What types and tensors of one shape hold."""

    of_type: tl.tuple
    of_tensor: tl.tuple
    numel: tl.constexpr
    text: str


@functools.cache
def described(*sizes: int) -> Shape:
    """The shape of these sizes, made once, which also knows itself."""
    numel = tl.constexpr(tl.core.validate_block_shape(sizes))
    of_type = tl.tuple(sizes)
    of_tensor = tl.tuple([tl.constexpr(size) for size in sizes])
    of_type.described = Shape(of_type, of_tensor, numel, str(of_type))
    return of_type.described


def block_of(self, element_ty, shape) -> None:
    """The constructor of a block's type."""
    known = getattr(shape, "described", None)
    known = known or described(*(getattr(size, "value", size) for size in shape))
    if known.text == "[]":
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.shape, self.numel = element_ty, known.of_type, known.numel.value
    self.name = f"<{known.text}, {element_ty}>"


def tensor_of(self, handle, type) -> None:
    """The constructor of a tensor."""
    known = type.shape.described if type.is_block() else described()
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known.of_tensor, known.numel
