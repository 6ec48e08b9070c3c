"""The kernels on tensors that lie in memory otherwise than a model's usually do.

Transposed, sliced, expanded and strided ones, against the torch backend on the same tensors;
and vectors so far apart that 32 bits do not reach them, against the same vectors close by.
Memory between those is never touched, so that without a GPU the system need not have it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from cases import Case
from test_kernels import DEVICE, check_same, no_gradients, with_backend  # noqa: F401
from torch.nn import functional
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

from keyformer import KeyformerCache, KeyformerConfig, backends
from keyformer.attention import AttentionSpec, Tokens
from keyformer.cache import KeyformerLayer
from keyformer.kernels import norm, prefill
from keyformer.kernels.rotary import rotate_neighbours
from keyformer.kernels.tiles import FARTHEST, readable, slot_tile
from keyformer.precision import dequantize, quantize
from keyformer.score import Scorer
from keyformer.text import Span

pytestmark = pytest.mark.usefixtures("no_gradients")

Layout = Callable[[torch.Tensor], torch.Tensor]


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The last dimension is the slower one of the last two."""
    return x.transpose(-2, -1).contiguous().transpose(-2, -1)


def every_other(x: torch.Tensor) -> torch.Tensor:
    """Elements of a vector are two apart."""
    return torch.stack([x, x + 9], dim=-1).flatten(-2)[..., ::2]


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Vectors are in the middle of larger ones, off by one element from where loads align."""
    return torch.cat([x[..., :1] + 9, x, x + 9], dim=-1)[..., 1 : x.shape[-1] + 1]


def sequences_last(x: torch.Tensor) -> torch.Tensor:
    """The sequences of a batch are next to one another."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """All elements of a vector are one."""
    return x[..., :1].expand(x.shape)


LAYOUTS: list[Layout] = [transposed, every_other, sliced, expanded, sequences_last]
OWN = [layout for layout in LAYOUTS if layout is not expanded]
"""In these a tensor has memory of its own for each element, and can be written."""


def lay_out(layer: KeyformerLayer, first: int) -> None:
    """What slots hold, each in another layout."""
    for number, name in enumerate(KeyformerLayer.per_slot):
        layout = OWN[(first + number) % len(OWN)]
        setattr(layer, name, layout(getattr(layer, name)))


@dataclasses.dataclass
class LaidOut(Case):
    """Queries, keys, values, slopes and, between forwards, the slots: each in another layout."""

    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for number, name in enumerate(("query", "key", "value")):
            layout = LAYOUTS[(self.first + number) % len(LAYOUTS)]
            setattr(self, name, layout(getattr(self, name)))
        self.slopes = every_other(self.slopes)

    def attend(self, cache: KeyformerCache, layer: int, start: int, end: int) -> torch.Tensor:
        if start:
            lay_out(cache.layers[layer], self.first)
        return super().attend(cache, layer, start, end)


@pytest.mark.parametrize(
    ("first", "kind", "rotates"),
    [
        (0, "auto", False),
        (1, "int8", False),
        (2, "auto", True),
        (3, "int4", False),
        (4, "auto", False),
    ],
)
def test_a15_layouts(first: int, kind: str, rotates: bool) -> None:
    """A prompt, decode steps, and a later prompt with slots, rotated and quantized ones too."""
    config = KeyformerConfig(kv_cache=60, seed=3, cache_dtype=kind)
    case = LaidOut(config, 1, 2, [9, 5], [1, 3], True, 0, rotates, head_dim=12, first=first)
    check_same(case)


@pytest.mark.parametrize("head_dim", [6, 20, 80])
def test_a15_int4_of_any_even_head(head_dim: int) -> None:
    """Groups of 2, 4 and 16 channels: a head that is no power of two."""
    config = KeyformerConfig(kv_cache=80, seed=3, cache_dtype="int4")
    check_same(Case(config, 1, 2, [9], [1], True, 0, head_dim=head_dim))


@pytest.mark.parametrize("held", [0, 7])
def test_a15_positions_and_places_that_differ_in_layout(held: int) -> None:
    """Positions of the new tokens expanded over the heads, their places not, or transposed."""
    batch, kv_heads, tokens = 2, 3, 5
    query = torch.randn(batch, 2 * kv_heads, tokens, 8, device=DEVICE)
    slots, new = torch.randn(2, batch, kv_heads, held + tokens, 8, device=DEVICE).split(
        [held, tokens], dim=-2
    )
    at = torch.arange(held + tokens, device=DEVICE).expand(batch, kv_heads, -1)
    read = Tokens(*slots, at[..., :held], transposed(at[..., :held]))
    given = Tokens(*new, at[..., held:], transposed(at[..., held:] + 3))
    slopes = every_other(torch.rand(2 * kv_heads, device=DEVICE))
    spec, span = AttentionSpec(0.3, slopes), Span(given.positions[:, 0], given.places[:, 0])
    expected, got = (
        backends.prefill(config, query, read, given, spec, Scorer(config, 1, 0, 1.5), span=span)
        for config in (KeyformerConfig(seed=1, backend=name) for name in ("torch", "triton"))
    )
    assert torch.equal(got.positions, expected.positions)
    assert torch.allclose(got.output, expected.output, atol=1e-4)
    assert torch.allclose(*got.received, *expected.received, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a15_rotations(layout: Layout) -> None:
    """Vectors, angles and places each in the layout; no tokens at all."""
    vectors = layout(torch.randn(2, 3, 7, 20, device=DEVICE))
    table = layout(create_sinusoidal_positions(40, 8).to(DEVICE))
    places = layout(torch.randint(-1, 40, (2, 3, 7), device=DEVICE))
    got = rotate_neighbours(vectors, table, places)
    close_by = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (vectors, table))
    assert torch.equal(got, rotate_neighbours(*close_by, places.contiguous()))
    assert rotate_neighbours(vectors[:, :, :0], table, places[:, :, :0]).shape == (2, 3, 0, 20)


@pytest.mark.parametrize("layout", [transposed, every_other, sliced, expanded])
def test_a15_layer_norm(layout: Layout) -> None:
    """Rows and weights in the layout; rows without elements, and none."""
    rows = layout(torch.randn(3, 24, device=DEVICE))
    weight, bias = (layout(torch.randn(2, 24, device=DEVICE))[0] for _ in range(2))
    expected = functional.layer_norm(rows, (24,), weight, bias)
    for one in (rows, rows.contiguous()):
        assert torch.allclose(norm.layer_norm(one, (24,), weight, bias), expected, atol=1e-5)
    for shape in ((3, 0), (0, 24)):
        assert norm.layer_norm(torch.empty(shape, device=DEVICE), shape[1:]).shape == shape
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm.layer_norm(rows.contiguous(), (12,))


@pytest.mark.parametrize("first", [0, 2])
def test_a15_reordering(first: int) -> None:
    """Slots each in another layout, parents and the table of what rows share strided."""
    config = KeyformerConfig(kv_budget=4, seed=0, cache_dtype="int8")
    case = LaidOut(config, 1, 1, [6, 5, 6], [1], True, 0, first=first)
    parents = torch.tensor([2, 9, 0, 9, 0, 9], device=DEVICE)[::2]
    caches = []
    for backend in ("torch", "triton"):
        run = with_backend(case, backend).run()
        cache, *_ = next(run)
        next(run)
        lay_out(cache.layers[0], first)
        cache.text.shared = transposed(cache.text.shared)
        cache.reorder_cache(parents)
        caches.append(cache)
    for name in KeyformerLayer.per_slot:
        ours, theirs = (getattr(cache.layers[0], name) for cache in caches)
        assert torch.allclose(ours, theirs, atol=1e-5), name


def far(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same numbers with the third of ``dim`` 2^31 elements from the first; float16."""
    strides = list(x.contiguous().stride())
    strides = [stride * (x.shape[dim] if n < dim else 1) for n, stride in enumerate(strides)]
    strides[dim] = 2**30
    return torch.empty_strided(x.shape, strides, dtype=torch.float16, device=x.device).copy_(x)


@pytest.mark.parametrize("dim", [0, 1], ids=["sequences", "heads"])
def test_a21_far_apart(dim: int) -> None:
    """Sequences or heads of queries, keys and values: a prompt and decode steps, bit for bit."""
    config = KeyformerConfig(kv_cache=60, seed=3, backend="triton")
    prompts, kv_heads = ([6, 4, 6], 1) if dim == 0 else ([6], 3)
    case = Case(config, kv_heads, 1, prompts, [1], True, 0, device=DEVICE)
    ends = []
    for place in (lambda x: x.half(), lambda x: far(x, dim)):
        one = dataclasses.replace(case)
        for name in ("query", "key", "value"):
            setattr(one, name, place(getattr(one, name)))
        outputs = []
        for cache, _, output in one.run():  # noqa: B007
            outputs.append(output)
        layer = cache.layers[0]
        ends.append([*outputs, *(getattr(layer, name) for name in KeyformerLayer.per_slot)])
    assert all(map(torch.equal, *ends))


def test_a21_heads_of_a_group_far_apart() -> None:
    """Queries that share a key, as a slice of a long text has them."""
    config = KeyformerConfig(kv_cache=60, seed=3, backend="triton")
    case = Case(config, 1, 3, [5], [1], True, 0, device=DEVICE)
    ends = []
    for place in (lambda x: x, lambda x: far(x, 1)):
        one = dataclasses.replace(case)
        one.query = place(one.query.half())
        one.key, one.value = one.key.half(), one.value.half()
        outputs = [output for _, _, output in one.run()]
        ends.append(outputs)
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("dim", [0, 1])
def test_a21_rotations_far_apart(dim: int) -> None:
    table = create_sinusoidal_positions(40, 4).to(DEVICE)
    vectors = torch.randn(3, 3, 2, 4, device=DEVICE).half()
    places = torch.randint(0, 40, (3, 3, 2), device=DEVICE)
    expected = rotate_neighbours(vectors, table, places)
    assert torch.equal(rotate_neighbours(far(vectors, dim), table, places), expected)


def test_a21_tokens_far_apart_are_copied() -> None:
    """A tile's offsets have 32 bits, so a kernel gets no stride that they cannot multiply."""
    near = torch.empty_strided((1, 1, 2, 4), (1, 1, FARTHEST - 1, 1), device=DEVICE)
    assert readable(near) is near
    apart = torch.empty_strided((1, 1, 2, 4), (1, 1, FARTHEST, 1), device=DEVICE)
    apart.copy_(torch.arange(8).view(2, 4))
    assert readable(apart).is_contiguous()
    assert torch.equal(readable(apart), apart)


class Changed:
    """A kernel that is launched with other arguments than it is given, those not looked at."""

    def __init__(self, kernel, **arguments) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.signature = inspect.signature(kernel.fn)

    def __getitem__(self, grid):
        def launch(*positional, **named) -> None:
            known = {name: named.pop(name) for name in self.signature.parameters if name in named}
            given = self.signature.bind(*positional, **known).arguments
            self.kernel[grid](**(given | self.arguments), **named)

        return launch


def test_a21_softmaxes_of_heads_far_apart(monkeypatch) -> None:
    """What the first kernel of a prompt leaves to the second, as of a text of 2^30 tokens."""
    config = KeyformerConfig(kv_cache=60, seed=3, backend="triton")
    case = Case(config, 3, 1, [6], [], True, 0, device=DEVICE)

    def run() -> list[torch.Tensor]:
        results = []
        for cache, _, output in case.run():
            results += [output, cache.layers[0].scores.clone()]
        return results

    expected = run()
    apart = {
        "padded": 2**30,
        "normal": torch.empty(2**31 + 64, device=DEVICE),
        "hashes": torch.empty(2**31 + 64, dtype=torch.int32, device=DEVICE),
    }
    for name in ("attend", "score"):
        monkeypatch.setattr(prefill, name, Changed(getattr(prefill, name), **apart))
    assert all(map(torch.equal, run(), expected))


@triton.jit
def _read(
    out,
    elements,
    scales,
    start,
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    tile = slot_tile(
        elements, scales, start, start + 2, tl.float32, KIND, SCALES, HEAD_DIM, DIM_BLOCK, 16
    )
    slot, dim = tl.arange(0, 16)[:, None], tl.arange(0, DIM_BLOCK)[None, :]
    tl.store(out + slot * HEAD_DIM + dim, tile, mask=(slot < 2) & (dim < HEAD_DIM))


@pytest.mark.parametrize(
    ("kind", "head_dim"), [("float8", 16), ("int8", 24), ("int4", 32), ("int4", 48)]
)
def test_a21_slots_far_from_the_first(kind: str, head_dim: int) -> None:
    """Quantized ones of a single head, 2^31 elements on."""
    vectors = torch.randn(2, head_dim, device=DEVICE)
    elements, scales = quantize(vectors, kind)
    start = 2**31 // elements.shape[-1] + 1
    apart = []
    for tensor in (elements, scales):
        shape = (start + 2, tensor.shape[-1])
        apart.append(torch.empty(shape, dtype=tensor.dtype, device=DEVICE))
        apart[-1][start:] = tensor
    got = torch.empty_like(vectors)
    block = triton.next_power_of_2(head_dim)
    _read[(1,)](got, *apart, start, kind, scales.shape[-1], head_dim, block)
    assert torch.allclose(got, dequantize(elements, scales, kind, torch.float32))
