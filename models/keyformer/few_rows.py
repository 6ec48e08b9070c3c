"""A decode step's operations, taken by kernels that are made for its few rows.

Models write a layer as small steps: three projections of one input, an activation, a product, a
sum. On a GPU each is a launch, and with one token a sequence launches are most of what a step
takes beside reading its weights. So a linear map is not computed when it is called but when what
it gives is read. By then it is known what that is for, and :mod:`keyformer.kernels.linear` does
it together with what follows, or with its siblings.

This is for a step that is captured (:mod:`keyformer.replay`): the detour counts once.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from keyformer.kernels import DTYPES, linear, norm, rotary

VIEWS = (Tensor.view, Tensor.transpose)
"""What leads to the numbers of a tensor without reading them."""

HARMLESS = {
    *(torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty),
    *(torch.ops.aten.view, torch.ops.aten.transpose, torch.ops.aten.as_strided),
}
"""Operations that read and write no number."""

QUESTIONS = (Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.is_contiguous)
"""What does not look at the numbers of a tensor."""

ROTATION = "apply_rotary_pos_emb"
"""What transformers' models call the function that rotates queries and keys."""

ROTATED = ("q", "k", "cos", "sin", "unsqueeze_dim")
"""What it takes, the last not always."""


@dataclass(eq=False)
class Deferred:
    """A linear map that is not computed yet.

    Attributes
    ----------
    x, weight, bias
        Of torch.nn.functional.linear.
    activation
        What is done to the result: see :func:`keyformer.kernels.linear.linear`.
    shape, strides
        Of the result.
    holders
        The tensor that is to hold it, and views of that: once all are gone, nobody reads it.
    used
        Whether it has been computed together with what follows it, so that itself it will
        hardly be read.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    shape: torch.Size
    strides: tuple[int, ...]
    holders: list[weakref.ref[Tensor]] = field(default_factory=list)
    used: bool = False

    @property
    def result(self) -> Tensor | None:
        """Where it goes; None if it will not be read."""
        for holder in self.holders:
            if (tensor := holder()) is not None:
                return tensor.as_strided(self.shape, self.strides, 0)
        return None


class FewRows(TorchFunctionMode):
    """While it is on, a step of ``model`` takes few launches, and is rounded less often.

    What is in none of its patterns is computed when it is called, as ever.

    Parameters
    ----------
    model
        Its RMS norms and its rotation, which are no functions of torch, are compared with the
        kernels', which may wait for the device.
    """

    alone = threading.RLock()
    """One step at a time: others would take what stands in for a model's functions for these."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.deferred: dict[int, Deferred] = {}
        self.guard = _Guard(self)
        with self.alone:
            self.norms, self.rotations = _rms_norms(model), _rotations(model)
        self.understood: dict[Any, Callable[..., Any]] = {
            functional.linear: self._linear,
            functional.dropout: _dropout,
            functional.silu: self._silu,
            functional.gelu: self._gelu,
            Tensor.mul: self._mul,
            torch.mul: self._mul,
            Tensor.add: self._add,
            torch.add: self._add,
        }
        self.replaced: dict[Any, Callable[..., Any]] = {
            functional.layer_norm: norm.layer_norm,
            functional.rms_norm: norm.rms_norm,
        }

    def __enter__(self) -> FewRows:
        self.alone.acquire()
        for module, forward in self.norms:
            vars(module)["forward"] = forward
        for names, _, rotate in self.rotations:
            names[ROTATION] = rotate
        self.guard.__enter__()
        return super().__enter__()

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        self.guard.__exit__(kind, *error)
        for module, _ in self.norms:
            del vars(module)["forward"]
        for names, theirs, _ in self.rotations:
            names[ROTATION] = theirs
        try:
            if kind is None:
                self.settle_all()
        finally:
            self.deferred.clear()
            self.alone.release()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The result of a function that a model calls, or where it is going to be."""
        kwargs = kwargs or {}
        if function in self.understood:
            result = self.understood[function](*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = getattr(function, "__name__", "")
        as_it_is = not any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values()))
        if (function in VIEWS and as_it_is) or function in QUESTIONS or name == "__get__":
            result = function(*args, **kwargs)
            if deferred := self._find(result):
                deferred.holders.append(weakref.ref(result))
            return result
        # Whatever it is, it may read what is deferred; of what has been used that is unlikely.
        self.settle_all(used_too=name == "__set__")
        self.settle(*args, *kwargs.values())
        if function in self.replaced:
            with self.guard.trusting():
                return self.replaced[function](*args, **kwargs)
        return function(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if not _fits(input, weight, bias):
            return NotImplemented
        self.settle(input, weight, bias)
        return self._defer(input, weight, bias, "none")

    def _silu(self, input: Tensor, inplace: bool = False) -> Any:
        return NotImplemented if inplace else self._activated(input, "silu")

    def _gelu(self, input: Tensor, approximate: str = "none") -> Any:
        activation = {"none": "gelu", "tanh": "gelu by tanh"}.get(approximate)
        return NotImplemented if activation is None else self._activated(input, activation)

    def _activated(self, input: Tensor, activation: str) -> Any:
        before = self._plain(input)
        if before is None:
            return NotImplemented
        before.used = True
        return self._defer(before.x, before.weight, before.bias, activation)

    def _mul(self, input: Any, other: Any, *, out: Any = None) -> Any:
        """A gated unit: the activation of one linear map, times another of the same input."""
        for gate, up in ((input, other), (other, input)):
            first, second = self._whole(gate), self._plain(up)
            if first is None or second is None or out is not None or first.activation == "none":
                continue
            if first.x is second.x and first.shape == second.shape:
                product = torch.empty_like(up)
                first.used = second.used = True
                self._launch(
                    first.x,
                    [first.weight, second.weight],
                    [first.bias, second.bias],
                    [product],
                    activation=first.activation,
                    gated=True,
                )
                return product
        return NotImplemented

    def _add(self, input: Any, other: Any, *rest: Any, **options: Any) -> Any:
        """A linear map and what it is added to."""
        for summand, residual in ((other, input), (input, other)):
            deferred = self._plain(summand)
            if deferred is not None and not (rest or options) and _alike(summand, residual):
                self.settle(residual)
                total = torch.empty_like(summand)
                deferred.used = True
                x, weight, bias = deferred.x, deferred.weight, deferred.bias
                self._launch(x, [weight], [bias], [total], residual=residual)
                return total
        return NotImplemented

    def _defer(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        self.deferred = {at: one for at, one in self.deferred.items() if one.result is not None}
        result = x.new_empty(*x.shape[:-1], len(weight))
        deferred = Deferred(x, weight, bias, activation, result.shape, result.stride())
        deferred.holders.append(weakref.ref(result))
        self.deferred[result.untyped_storage().data_ptr()] = deferred
        return result

    def _find(self, tensor: Any) -> Deferred | None:
        """What is to be computed before this can be read."""
        if type(tensor) is not Tensor or tensor.layout != torch.strided or not self.deferred:
            return None
        try:
            at = tensor.untyped_storage().data_ptr()
        except NotImplementedError:  # as inside of vmap
            return None
        deferred = self.deferred.get(at)
        if deferred is not None and deferred.result is None:  # the memory is another's now
            del self.deferred[at]
            return None
        return deferred

    def _whole(self, tensor: Any) -> Deferred | None:
        """What is to be computed and is this tensor, not another view of it."""
        deferred = self._find(tensor)
        if deferred is None or (deferred.shape, deferred.strides) != (
            tensor.shape,
            tensor.stride(),
        ):
            return None
        return deferred if tensor.dtype == deferred.x.dtype else None

    def _plain(self, tensor: Any) -> Deferred | None:
        """The same of a linear map without an activation."""
        deferred = self._whole(tensor)
        return deferred if deferred is not None and deferred.activation == "none" else None

    def settle(self, *read: Any) -> None:
        """Compute what these are to hold, tensors or lists of them."""
        for one in read:
            if isinstance(one, (tuple, list)):
                self.settle(*one)
            elif (deferred := self._find(one)) is not None:
                self._compute(deferred)

    def settle_all(self, used_too: bool = True) -> None:
        """Compute all that is deferred, or what has not been used."""
        while waiting := [one for one in self.deferred.values() if used_too or not one.used]:
            self._compute(waiting[0])

    def _launch(self, *arguments: Any, **options: Any) -> None:
        with self.guard.trusting():
            linear.linear(*arguments, **options)

    def _compute(self, deferred: Deferred) -> None:
        x, activation = deferred.x, deferred.activation
        together = [deferred]
        if activation == "none":
            alike = (one for one in self.deferred.values() if one.x is x)
            others = [one for one in alike if one.activation == "none" and not one.used]
            others = [one for one in others if one is not deferred]
            together += others[: linear.MOST_MATRICES - 1]
        self.deferred = {at: one for at, one in self.deferred.items() if one not in together}
        wanted = [(one, result) for one in together if (result := one.result) is not None]
        if wanted:
            self._launch(
                x,
                [one.weight for one, _ in wanted],
                [one.bias for one, _ in wanted],
                [result for _, result in wanted],
                activation=activation,
            )


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return NotImplemented if training else input


def _fits(x: Tensor, weight: Any, bias: Any) -> bool:
    """Whether the kernel can take a linear map."""
    read = [x, weight] if bias is None else [x, weight, bias]
    if not all(map(_is_dense, read)) or not x.ndim or not x.numel() or x.dtype not in DTYPES:
        return False  # such as quantized weights
    if torch.is_autocast_enabled(x.device.type):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read):
        return False
    matches = weight.shape[1:] == x.shape[-1:] and len(weight) > 0
    matches &= bias is None or bias.shape == weight.shape[:1]
    alike = all(tensor.dtype == x.dtype and tensor.device == x.device for tensor in read)
    few = x.numel() <= linear.MOST_ROWS * x.shape[-1]
    return matches and alike and few and (x.is_cuda or triton.knobs.runtime.interpret)


def _is_dense(tensor: Any) -> bool:
    """Whether it is torch's own, with all its numbers side by side in memory."""
    own = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return own and tensor.is_contiguous() and not (tensor.is_neg() or tensor.is_conj())


def _alike(one: Tensor, other: Any) -> bool:
    known = _is_dense(other) and not other.requires_grad
    return known and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class _Guard(TorchDispatchMode):
    """Sees also what reads or writes numbers without being called as a function of torch."""

    def __init__(self, of: FewRows) -> None:
        super().__init__()
        self.of, self.trusts = of, False

    @contextmanager
    def trusting(self) -> Iterator[None]:
        """Within, kernels are launched that read nothing deferred, and write what is new."""
        self.trusts = True
        try:
            yield
        finally:
            self.trusts = False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation.overloadpacket not in HARMLESS and not self.trusts:
            if operation._schema.is_mutable:  # it may be what something is computed from
                self.of.settle_all()
            self.of.settle(*args, *kwargs.values())
        return operation(*args, **kwargs)


def _rms_norms(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """The modules of a model that compute torch's rms_norm in steps, and that itself."""
    found: list[tuple[nn.Module, Callable[..., Tensor]]] = []
    kinds: dict[Any, bool] = {}
    for module in model.modules():
        kind, weight = type(module), getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not kind.__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter):
            continue
        takes_one = len(inspect.signature(kind.forward).parameters) == 2  # itself is the other
        if not takes_one or not isinstance(eps, float) or "forward" in vars(module):
            continue
        settings = {name: value for name, value in vars(module).items() if _is_setting(value)}
        like = (kind, weight.dtype, *settings.items())
        if like not in kinds:
            x = torch.linspace(-2, 3, weight.shape[-1], dtype=weight.dtype, device=weight.device)
            got = functional.rms_norm(x[None], weight.shape, weight, eps)
            kinds[like] = _close(kind.forward(module, x[None]), got)
        if kinds[like]:
            found.append((module, _rms_norm(module, weight, eps)))
    return found


def _is_setting(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, type(None)))


def _rms_norm(module: nn.Module, weight: Tensor, eps: float) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if x.dtype != weight.dtype:
            return type(module).forward(module, x)  # type: ignore[attr-defined]
        return functional.rms_norm(x, weight.shape, weight, eps)

    return forward


def _rotations(model: nn.Module) -> list[tuple[dict[str, Any], Any, Callable[..., Any]]]:
    """Where the modules that a model is written in have a function that rotates halves, that
    function, and what stands in for it."""
    found = []
    query, key, cos, sin = torch.linspace(-2, 3, 40).split([16, 8, 8, 8])
    query, key, cos, sin = query.view(1, 2, 1, 8), key.view(1, 1, 1, 8), cos[None], sin[None]
    expected = [x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin for x in (query, key)]
    for source in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[source]) if source in sys.modules else {}
        theirs = names.get(ROTATION)
        if theirs is None:
            continue
        takes = tuple(inspect.signature(theirs).parameters)
        if takes not in (ROTATED, ROTATED[:-1]):
            continue
        try:
            got = theirs(query, key, cos[None], sin[None])
        except RuntimeError:  # it takes angles of another shape
            continue
        if all(map(_close, got, expected)):
            found.append((names, theirs, _rotation(theirs)))
    return found


def _rotation(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("unsqueeze_dim", 1) != 1 or not _fit_together(q, k, cos, sin):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return rotary.rotate_halves(q, k, cos, sin)

    return rotate


def _fit_together(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel can rotate these: all of one dtype, and angles for each token."""
    if not q.ndim == k.ndim == 4 or cos.ndim != 3 or cos.shape != sin.shape:
        return False
    batch, _, tokens, head_dim = q.shape
    if (len(k), *k.shape[2:]) != (batch, tokens, head_dim) or head_dim % 2:
        return False
    alike = {(one.dtype, one.device) for one in (q, k, cos, sin)}
    angles = cos.shape in ((1, tokens, head_dim), (batch, tokens, head_dim))
    return angles and len(alike) == 1 and q.dtype in DTYPES


def _close(got: Tensor, expected: Tensor) -> bool:
    """Alike but for rounding in 16 bits, for numbers of any size."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    least = 2**-6 * float(expected.abs().max())
    return torch.allclose(got.float(), expected.float(), rtol=2**-6, atol=least)
