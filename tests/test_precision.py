"""Keys and values in fewer bits: the error of each kind, and the cache that holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import script
from families import small_model
from hypothesis import given
from hypothesis import strategies as st

from keyformer import (
    InputError,
    KeyformerCache,
    KeyformerConfig,
    enable_keyformer,
    load_model,
)
from keyformer.config import CACHE_DTYPES
from keyformer.precision import dequantize, group_size, quantize
from keyformer_evaluation.tasks.data import TASKS, load_items

KINDS = CACHE_DTYPES[1:]
BITS = {"float8": 8, "int8": 8, "int4": 4}


def allowed(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The largest error of each element that :func:`quantize` states, by its definition."""
    if kind == "float8":
        # Below 2^-6, where E4M3 loses digits, half of its smallest step.
        largest = x.abs().amax(-1, keepdim=True)
        return torch.maximum(x.abs() * 2**-4, largest / 448 * 2**-10) * 1.001 + largest * 2**-11
    size = group_size(x.shape[-1], kind)
    largest = x.unflatten(-1, (-1, size)).abs().amax(-1).repeat_interleave(size, -1)
    return largest * (1 / 254 if kind == "int8" else 1 / 14) * 1.001 + largest * 2**-10


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 2**31),
    head_dim=st.sampled_from([8, 48, 64, 80, 128]),
    magnitude=st.sampled_from([2.0**-5, 1.0, 300.0]),
    outlier=st.sampled_from([1.0, 40.0]),
)
def test_error_of_an_element(kind, seed, head_dim, magnitude, outlier) -> None:
    x = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(seed)) * magnitude
    x[..., 3] *= outlier  # keys have channels that stand out
    elements, scales = quantize(x, kind)
    assert ((dequantize(elements, scales, kind, torch.float32) - x).abs() <= allowed(x, kind)).all()
    stored = elements.nbytes * 8 + scales.nbytes * 8
    assert stored == x.numel() * BITS[kind] + 16 * x.numel() // group_size(head_dim, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_vector_is_quantized_by_itself(kind: str) -> None:
    x = torch.randn(2, 3, 5, 64)
    together, alone = quantize(x, kind), quantize(x[1:, 2:, 4:], kind)
    for all_of_them, one in zip(together, alone, strict=True):
        assert torch.equal(all_of_them[1:, 2:, 4:].float(), one.float())


@pytest.mark.parametrize("kind", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_zeros(kind: str, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 2, 3, 16, dtype=dtype)
    assert torch.equal(dequantize(*quantize(x, kind), kind, dtype), x)
    x = torch.full_like(x, 7.0)
    assert torch.allclose(dequantize(*quantize(x, kind), kind, dtype), x, rtol=1e-3)


def test_int4_layout() -> None:
    """What a kernel has to know: 8 added, channel c low and channel c + 4 high."""
    x = torch.tensor([-7.0, 1, 2, 3, 4, 5, 6, 7])
    elements, scales = quantize(x, "int4")
    assert scales.tolist() == [1.0]
    assert elements.tolist() == [1 + (12 << 4), 9 + (13 << 4), 10 + (14 << 4), 11 + (15 << 4)]


HEAD_DIM = 64
PER_SLOT = {"float8": 64 + 2, "int8": 64 + 2, "int4": 32 + 4}
"""Bytes of one vector and its scales: one of float16, or two."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["original", "new"])
def test_attention_reads_what_the_slots_hold(kind: str, positions: str) -> None:
    """An unquantized cache whose slots are rounded after each step does the same."""
    settings = {"kv_cache": 40, "noise": "none", "positions": positions}
    model = small_model("llama")
    quantized = KeyformerCache(model.config, KeyformerConfig(cache_dtype=kind, **settings))
    rounded = KeyformerCache(model.config, KeyformerConfig(**settings))
    torch.manual_seed(0)
    for tokens in (30, 1, 1, 7, 1):
        query = torch.randn(2, 4, tokens, HEAD_DIM)
        key, value = torch.randn(2, 2, 2, tokens, HEAD_DIM)
        real = torch.ones(2, tokens, dtype=torch.bool)
        outputs = [
            cache.attend(query, key, value, 0, real, scale=0.2).output
            for cache in (quantized, rounded)
        ]
        assert torch.allclose(*outputs, atol=1e-5)
        one, other = quantized.layers[0], rounded.layers[0]
        assert torch.equal(one.positions, other.positions)
        assert torch.allclose(one.scores, other.scores, atol=1e-5)
        for name in ("keys", "values"):
            vectors = getattr(other, name)
            setattr(other, name, dequantize(*quantize(vectors, kind), kind, torch.float32))
        assert torch.equal(torch.stack(one.read()), torch.stack([other.keys, other.values]))
    slots = 2 * 2 * 12
    assert one.memory_bytes() == slots * (2 * PER_SLOT[kind] + 8 + 4)
    assert other.memory_bytes() == slots * (2 * 4 * HEAD_DIM + 8 + 4)


ERROR = {"float8": 0.05, "int8": 0.01, "int4": 0.15}
"""Of a bundled model's logits, relative, where nothing is evicted."""


@torch.no_grad()
@pytest.mark.parametrize("name", ["mpt", "gptj", "cerebras"])
def test_error_of_the_logits(name: str) -> None:
    root = Path(__file__).parents[1]
    model, tokenizer = load_model(root / "models" / f"{name}-tiny-keyformer", device="cpu")
    (item,) = load_items(
        root / "summarization" / "data" / "sample_eval.json", TASKS["summarization"]
    )[:1]
    text = tokenizer(item["input"], return_tensors="pt")["input_ids"][:, :104]
    logits = {}
    for kind in CACHE_DTYPES:
        config = KeyformerConfig.preset("full", cache_dtype=kind)
        cache = KeyformerCache(model.config, config)
        model(text[:, :100], past_key_values=cache)
        steps = [model(token, past_key_values=cache).logits for token in text[:, 100:].split(1, 1)]
        logits[kind] = torch.cat(steps, dim=1)
    exact = logits.pop("auto")
    for kind, got in logits.items():
        assert 0 < (got - exact).norm() / exact.norm() < ERROR[kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_a_window_are_quantized_too(kind: str) -> None:
    model = enable_keyformer(small_model("gemma3_text"))
    cache = KeyformerCache(model.config, KeyformerConfig(kv_cache=50, cache_dtype=kind))
    model.generate(torch.randint(2, 61, (1, 30)), past_key_values=cache, max_new_tokens=9)
    stored = {"float8": 8 + 2, "int8": 8 + 2, "int4": 4 + 2}[kind]
    assert cache.memory_bytes() == (9 + 15) * 2 * (2 * stored + 8 + 4)


def test_int4_needs_an_even_number_of_channels() -> None:
    config = KeyformerConfig(cache_dtype="int4")
    cache = KeyformerCache(small_model("llama").config, config)
    vectors = torch.randn(1, 2, 5, 9)
    with pytest.raises(InputError, match="has 9"):
        cache.attend(vectors, vectors, vectors, 0, torch.ones(1, 5, dtype=torch.bool), scale=1.0)


def test_task_script_takes_it(tmp_path) -> None:
    occupied = []
    for kind in ("auto", "int4"):
        scores = tmp_path / f"{kind}.json"
        flags = ["--keyformer", "--cache_dtype", kind, "--n_obs", "1", "--max_new_tokens", "3"]
        paths = ["--save_path", str(tmp_path / f"{kind}.txt"), "--score_path", str(scores)]
        script("summarization", "summarize").main([*flags, *paths, "--device", "cpu"])
        result = json.loads(scores.read_text())
        assert result["config"]["cache_dtype"] == kind
        occupied.append(result["kv_bytes_end"])
    assert 2 * occupied[1] < occupied[0]
