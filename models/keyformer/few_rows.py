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
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from keyformer.kernels import linear, norm, rotary

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

VIEWS = (Tensor.view, Tensor.transpose)
"""What leads to the numbers of a tensor without reading them."""

QUESTIONS = (Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.is_contiguous)
"""What does not look at the numbers of a tensor."""

ROTATION = "apply_rotary_pos_emb"
"""What transformers' models call the function that rotates queries and keys."""

ROTATED = ("q", "k", "cos", "sin")
"""What it takes."""


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
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    shape: torch.Size
    strides: tuple[int, ...]
    holders: list[weakref.ref[Tensor]] = field(default_factory=list)

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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.deferred: dict[int, Deferred] = {}
        self.swapped: list[tuple[dict[str, Any], str, Any]] = [
            *((vars(module), "forward", forward) for module, forward in _rms_norms(model)),
            *((names, ROTATION, rotate) for names, rotate in _rotations(model)),
        ]
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
        self._swap()
        return super().__enter__()

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        self._swap()
        if kind is None:
            self._settle_all()
        self.deferred.clear()

    def _swap(self) -> None:
        """Put what stands in for a model's own functions in their place, or take it back."""
        swapped = []
        for names, name, ours in self.swapped:
            swapped.append((names, name, names.get(name)))
            if ours is None:
                del names[name]
            else:
                names[name] = ours
        self.swapped = swapped

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
        if function in VIEWS or function in QUESTIONS or name == "__get__":
            result = function(*args, **kwargs)
            if isinstance(result, Tensor) and (deferred := self._find(result)):
                deferred.holders.append(weakref.ref(result))
            return result
        changes = name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__")
        if changes or "out" in kwargs or kwargs.get("inplace") or any(a is True for a in args):
            self._settle_all()  # what they are computed from may be what is changed
        for argument in (*args, *kwargs.values()):
            self._settle(*(argument if isinstance(argument, (tuple, list)) else (argument,)))
        return self.replaced.get(function, function)(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        if not _fits(input, weight, bias):
            return NotImplemented
        self._settle(input)
        return self._defer(input, weight, bias, "none")

    def _silu(self, input: Tensor, inplace: bool = False) -> Any:
        return NotImplemented if inplace else self._activated(input, "silu")

    def _gelu(self, input: Tensor, approximate: str = "none") -> Any:
        return self._activated(input, "gelu" if approximate == "none" else "gelu by tanh")

    def _activated(self, input: Tensor, activation: str) -> Any:
        before = self._plain(input)
        if before is None:
            return NotImplemented
        return self._defer(before.x, before.weight, before.bias, activation)

    def _mul(self, input: Any, other: Any, *, out: Any = None) -> Any:
        """A gated unit: the activation of one linear map, times another of the same input."""
        for gate, up in ((input, other), (other, input)):
            first, second = self._find(gate), self._plain(up)
            if first is None or second is None or out is not None or first.activation == "none":
                continue
            if first.x is second.x and first.shape == gate.shape == second.shape:
                product = torch.empty_like(up)
                linear.linear(
                    first.x,
                    [first.weight, second.weight],
                    [first.bias, second.bias],
                    [product],
                    activation=first.activation,
                    gated=True,
                )
                return product
        return NotImplemented

    def _add(self, input: Any, other: Any, *, alpha: Any = 1, out: Any = None) -> Any:
        """A linear map and what it is added to."""
        for summand, residual in ((other, input), (input, other)):
            deferred = self._plain(summand)
            if deferred is None or alpha != 1 or out is not None:
                continue
            if isinstance(residual, Tensor) and _alike(summand, residual):
                self._settle(residual)
                total = torch.empty_like(summand)
                x, weight, bias = deferred.x, deferred.weight, deferred.bias
                linear.linear(x, [weight], [bias], [total], residual=residual)
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
        if type(tensor) is not Tensor or not self.deferred:
            return None
        at = tensor.untyped_storage().data_ptr()
        deferred = self.deferred.get(at)
        if deferred is not None and deferred.result is None:  # the memory is another's now
            del self.deferred[at]
            return None
        return deferred

    def _plain(self, tensor: Any) -> Deferred | None:
        """The linear map whose result this is, all of it, without an activation."""
        deferred = self._find(tensor)
        if deferred is None or deferred.activation != "none" or deferred.shape != tensor.shape:
            return None
        return deferred if tensor.is_contiguous() else None

    def _settle(self, *tensors: Any) -> None:
        """Compute what these are to hold, and with it further maps of the same input."""
        for tensor in tensors:
            if (deferred := self._find(tensor)) is not None:
                self._compute(deferred)

    def _settle_all(self) -> None:
        while self.deferred:
            self._compute(next(iter(self.deferred.values())))

    def _compute(self, deferred: Deferred) -> None:
        x, activation = deferred.x, deferred.activation
        together = [deferred]
        if activation == "none":
            alike = (one for one in self.deferred.values() if one.x is x)
            others = [one for one in alike if one.activation == "none" and one is not deferred]
            together += others[: linear.MOST_MATRICES - 1]
        self.deferred = {at: one for at, one in self.deferred.items() if one not in together}
        wanted = [(one, result) for one in together if (result := one.result) is not None]
        if wanted:
            linear.linear(
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
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in read):
        return False  # such as quantized weights
    if torch.is_autocast_enabled(x.device.type) or x.dtype not in DTYPES or not x.numel():
        return False
    alike = all(t.dtype == x.dtype and t.device == x.device and t.is_contiguous() for t in read)
    few = weight.ndim == 2 and len(weight) and x.numel() <= linear.MOST_ROWS * x.shape[-1]
    return alike and bool(few) and (x.is_cuda or triton.knobs.runtime.interpret)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device) and (
        one.is_contiguous() and other.is_contiguous()
    )


def _rms_norms(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """The modules of a model that compute torch's rms_norm in steps, and that itself."""
    found, kinds = [], {}
    for module in model.modules():
        kind, weight = type(module), getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not kind.__name__.endswith("RMSNorm") or not isinstance(weight, Tensor):
            continue
        if not isinstance(eps, float) or weight.ndim != 1 or "forward" in vars(module):
            continue
        if kind not in kinds:
            x = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
            got = functional.rms_norm(x[None], weight.shape, weight, eps)
            kinds[kind] = _close(kind.forward(module, x[None]), got)
        if kinds[kind]:
            found.append((module, _rms_norm(weight, eps)))
    return found


def _rms_norm(weight: Tensor, eps: float) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, weight.shape, weight, eps)

    return forward


def _rotations(model: nn.Module) -> list[tuple[dict[str, Any], Callable[..., Any]]]:
    """The names of the modules that a model is written in, and what rotates halves there."""
    found = []
    query, key, cos, sin = torch.linspace(-2, 3, 40).split([16, 8, 8, 8])
    query, key, cos, sin = query.view(1, 2, 1, 8), key.view(1, 1, 1, 8), cos[None], sin[None]
    expected = [x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin for x in (query, key)]
    for source in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[source])
        theirs = names.get(ROTATION)
        if theirs is None or tuple(inspect.signature(theirs).parameters)[:4] != ROTATED:
            continue
        if all(map(_close, theirs(query, key, cos[None], sin[None]), expected)):
            found.append((names, _rotation(theirs)))
    return found


def _rotation(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        whole = cos.ndim == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1]
        alike = {q.dtype, k.dtype, cos.dtype, sin.dtype} <= {q.dtype} & set(DTYPES)
        if args or kwargs.get("unsqueeze_dim", 1) != 1 or not whole or not alike:
            return theirs(q, k, cos, sin, *args, **kwargs)
        return rotary.rotate_halves(q, k, cos, sin)

    return rotate


def _close(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got.float(), expected.float(), rtol=2**-6, atol=2**-6)
