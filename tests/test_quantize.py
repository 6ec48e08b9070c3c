"""Quantized weights: what is loaded, how far it is off, and what it occupies."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import script
from families import small_model
from originals import write_original, write_tokenizer
from transformers.pytorch_utils import Conv1D

from keyformer import InputError, KeyformerCache, KeyformerConfig, load_model
from keyformer.quantize import QUANTIZATIONS, weight_bytes

WIDTH = {"mpt": {"d_model": 64}, "gptj": {"n_embd": 64}, "cerebras": {"n_embd": 64, "n_inner": 256}}
ERROR = {"bnb-8bit": 0.02, "bnb-4bit": 0.12, "int8": 0.01}
"""Of a layer's output, relative, on normal activations."""


def save(path: Path, name: str) -> Path:
    """A checkpoint whose layers are wide enough for blocks of 64 weights."""
    if name in WIDTH:
        return write_original(path, name, "safetensors", **WIDTH[name])
    small_model(name, hidden_size=64, vocab_size=320).save_pretrained(path)
    write_tokenizer(path, "cerebras", 320)
    return path


@pytest.mark.parametrize("kind", QUANTIZATIONS)
@pytest.mark.parametrize("name", [*WIDTH, "llama", "falcon"])
def test_outputs_stay_close_and_layers_shrink(tmp_path, name: str, kind: str) -> None:
    path = save(tmp_path / "model", name)
    config = KeyformerConfig.preset("h2o", kv_cache=50)
    plain, model = (
        load_model(path, config, dtype="float32", device="cpu", quantize=quantize)[0]
        for quantize in (None, kind)
    )
    layers = [
        (layer, model.get_submodule(name))
        for name, layer in plain.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D) and "head" not in name
    ]
    assert len(layers) >= 2 * 4
    for layer, quantized in layers:
        inputs = torch.randn(5, getattr(layer, "nx", None) or layer.in_features)
        with torch.no_grad():
            expected, got = layer(inputs), quantized(inputs)
        assert 0 < (got - expected).norm() / expected.norm() < ERROR[kind]
    bits = 4 if "4bit" in kind else 8
    before, after = (sum(map(weight_bytes, column)) for column in zip(*layers, strict=True))
    assert bits / 32 < after / before < bits / 32 + 0.08  # scales and biases
    assert weight_bytes(model) == weight_bytes(plain) - before + after
    cache = KeyformerCache(model.config, config)
    prompt = torch.randint(1, 320, (2, 24))
    model.generate(prompt, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    assert cache.layers[0].keys.shape[2] == 12


def test_weight_bytes_of_a_plain_model() -> None:
    """Tied weights count once."""
    model = small_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert weight_bytes(model) == model.get_memory_footprint()


def test_weight_bytes_of_one_layer() -> None:
    """By hand: int8 values, for each of 64 rows a float32 scale and an int8 zero; the bias."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(32, 64)
    quantize_(layer, Int8WeightOnlyConfig())
    assert weight_bytes(layer) == 64 * 32 + 64 * (4 + 1) + 64 * 4


def test_scripts_record_the_quantization(tmp_path) -> None:
    path = save(tmp_path / "mpt", "mpt")
    flags = ["--model_path", str(path), "--quantize", "int8", "--n_obs", "2", "--device", "cpu"]
    flags += ["--max_new_tokens", "3"]
    scores = tmp_path / "scores.json"
    paths = ["--save_path", str(tmp_path / "texts"), "--score_path", str(scores)]
    script("summarization", "summarize").main([*flags, *paths])
    record = tmp_path / "record.json"
    script("summarization", "compare").main([*flags, "--methods", "full", "--record", str(record)])
    for written in (scores, record):
        found = json.loads(written.read_text())
        assert found["quantize"] == "int8" and 0 < found["weight_bytes"] < 300_000


def test_benchmark_of_quantized_weights(tmp_path) -> None:
    record = tmp_path / "record.json"
    flags = ["--model_path", str(save(tmp_path / "mpt", "mpt")), "--quantize", "int8"]
    flags += ["--n_obs", "2", "--device", "cpu", "--max_new_tokens", "3", "--record", str(record)]
    script("benchmarks", "quantized_weights").main(flags)
    found = json.loads(record.read_text())
    kinds = [(row["quantize"], row["method"]) for row in found["rows"]]
    assert kinds == [(q, m) for q in (None, "int8") for m in ("full", "keyformer")]
    assert found["rows"][2]["weight_bytes"] < found["rows"][0]["weight_bytes"] / 2
    assert {"bitsandbytes", "torchao"} <= set(found["versions"])


def test_unusable_kinds_are_named(tmp_path, monkeypatch) -> None:
    path = save(tmp_path / "mpt", "mpt")
    with pytest.raises(InputError, match="int3"):
        load_model(path, device="cpu", quantize="int3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, package in QUANTIZATIONS.items():
        with pytest.raises(InputError, match=f"pip install .{package}") as error:
            load_model(path, device="cpu", quantize=kind)
        assert "\n" not in str(error.value)
