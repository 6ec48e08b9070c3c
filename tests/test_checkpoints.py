"""Checkpoints in the originals' format load unchanged and equal transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from originals import MPT_7B, ORIGINALS, write_original
from transformers import AutoModelForCausalLM, MptConfig, MptForCausalLM

from cerebras_keyformer import CerebrasKeyformerForCausalLM
from gptj_keyformer import GPTJKeyformerForCausalLM
from keyformer import InputError, KeyformerConfig, enable_keyformer, load_model
from mpt_keyformer import MptKeyformerForCausalLM


@pytest.mark.parametrize("weights", ["bin", "bin shards", "safetensors", "safetensors shards"])
def test_original_checkpoint_loads(tmp_path, arch: str, weights: str, recwarn, caplog) -> None:
    path = write_original(tmp_path / arch, arch, weights)
    full = KeyformerConfig.preset("full")
    model, tokenizer = load_model(path, full, dtype="float32", device="cpu")
    assert not [w for w in recwarn if "keyformer" in str(w.filename)]
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text
    equals_stock(model, tokenizer, path, arch)


def equals_stock(model, tokenizer, path: Path, arch: str) -> None:
    """The same parameters under the same names, and the same text from four beams."""
    stock = ORIGINALS[arch].model.from_pretrained(path, dtype=torch.float32).eval()
    stock.generation_config.use_cache = True
    names = [name for name, _ in stock.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True)
    )
    inputs = tokenizer(["the key tokens", "recent"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"][1, 0] == 0
    options = {"max_new_tokens": 12, "num_beams": 4, "pad_token_id": tokenizer.pad_token_id}
    assert torch.equal(model.generate(**inputs, **options), stock.generate(**inputs, **options))


@pytest.mark.parametrize(("name", "tied"), [("gptj", True), ("cerebras", False)])
def test_tied_and_untied_heads(tmp_path, name: str, tied: bool) -> None:
    """The other way round than the originals have it."""
    path = write_original(tmp_path / name, name, "safetensors", tie_word_embeddings=tied)
    full = KeyformerConfig.preset("full")
    model, tokenizer = load_model(path, full, dtype="float32", device="cpu")
    shared = model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert shared == tied
    equals_stock(model, tokenizer, path, name)


DTYPES = {
    "auto": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    torch.float32: torch.float32,
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(tmp_path, arch: str, dtype) -> None:
    """ "auto" is that of the weights."""
    path = write_original(tmp_path / "m", arch, "bin")
    model, tokenizer = load_model(path, dtype=dtype, device="cpu")
    stored = {"mpt": torch.bfloat16, "gptj": torch.float16, "cerebras": torch.float32}
    assert model.dtype == (DTYPES[dtype] or stored[arch])
    text = model.generate(**tokenizer("the key", return_tensors="pt"), max_new_tokens=3)
    assert text.shape[1] > 3


def test_layers_spread_over_devices(tmp_path, arch: str) -> None:
    """accelerate's hooks, here with one block kept on disk, change nothing."""
    path = write_original(tmp_path / "m", arch, "safetensors shards", layers=3)
    config = KeyformerConfig.preset("h2o", kv_cache=50)
    inputs = {"input_ids": torch.randint(1, 320, (2, 20)), "max_new_tokens": 8}
    model, _ = load_model(path, config, dtype="float32", device="cpu")
    expected = model.generate(**inputs)
    block = ORIGINALS[arch].block
    spread = {name: "cpu" for name, _ in model.named_children()}
    spread |= {f"transformer.{name}": "cpu" for name, _ in model.transformer.named_children()}
    del spread["transformer"], spread[block.removesuffix(".{}")]
    spread |= {block.format(i): "disk" if i == 1 else "cpu" for i in range(3)}
    for device_map in ("auto", spread):
        model, _ = load_model(
            path, config, dtype="float32", device_map=device_map, offload_folder=tmp_path / "off"
        )
        assert torch.equal(model.generate(**inputs), expected)
    stock = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        device_map=spread,
        offload_folder=tmp_path / "off2",
        trust_remote_code=False,
    )
    assert torch.equal(enable_keyformer(stock, config).generate(**inputs), expected)


PATCHED = {
    "mpt": MptKeyformerForCausalLM,
    "gptj": GPTJKeyformerForCausalLM,
    "cerebras": CerebrasKeyformerForCausalLM,
}


def test_patched_class_loads_and_saves(tmp_path, arch: str) -> None:
    """The model folder's own class is an ordinary transformers model."""
    path = write_original(tmp_path / "m", arch, "safetensors")
    model = PATCHED[arch].from_pretrained(path, dtype=torch.float32).eval()
    output = model.generate(
        torch.randint(1, 320, (1, 30)), max_new_tokens=4, return_dict_in_generate=True
    )
    assert output.past_key_values.layers[0].keys.shape[2] == 18  # the default, 60 %
    model.save_pretrained(tmp_path / "saved")
    again = ORIGINALS[arch].model.from_pretrained(tmp_path / "saved").eval()
    inputs = torch.randint(1, 320, (2, 9))
    with torch.no_grad():
        assert torch.allclose(model(inputs).logits, again(inputs).logits, atol=1e-4)


def test_storywriter_options(tmp_path) -> None:
    """The checkpoint's alibi_bias_max, and a clip_qkv that transformers refuses as whole."""
    attention = {**MPT_7B["attn_config"], "clip_qkv": 6, "alibi_bias_max": 16}
    path = write_original(
        tmp_path / "story", "mpt", "bin", attn_config=attention, max_seq_len=65536
    )
    model, _ = load_model(path, KeyformerConfig.preset("full"), dtype="float32", device="cpu")
    assert model.transformer.blocks[0].attn.clip_qkv == 6.0
    bias = model.transformer.build_mpt_alibi_tensor(4, 65536)  # of each key, as without a cache
    slopes = [2**-4, 2**-8, 2**-12, 2**-16]
    assert bias[:, 0, -2].tolist() == pytest.approx([-slope for slope in slopes])
    inputs = torch.randint(1, 320, (1, 15))
    with torch.no_grad():
        logits = [model(inputs, use_cache=use_cache).logits for use_cache in (True, False)]
    assert torch.allclose(*logits, atol=1e-4)
    attention = {**attention, "alibi_bias_max": 8, "clip_qkv": 0.5}
    path = write_original(tmp_path / "clipped", "mpt", "bin", attn_config=attention)
    model, _ = load_model(path, KeyformerConfig.preset("full"), dtype="float32", device="cpu")
    stock = MptForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs = torch.randint(1, 320, (2, 15))
    with torch.no_grad():
        assert torch.allclose(model(inputs).logits, stock(inputs).logits, atol=1e-4)


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_alibi_slopes_for_any_number_of_heads(heads: int) -> None:
    config = MptConfig(d_model=heads * 4, n_heads=heads, n_layers=1, vocab_size=11, max_seq_len=32)
    torch.manual_seed(0)
    model = MptKeyformerForCausalLM(config).eval()
    stock = MptForCausalLM(config).eval()
    stock.load_state_dict(model.state_dict())
    inputs = torch.randint(0, 11, (2, 20))
    with torch.no_grad():
        assert torch.allclose(model(inputs).logits, stock(inputs).logits, atol=1e-5)


def broken(tmp_path: Path, what: str) -> Path:
    path = tmp_path / what.replace(" ", "-")
    if what == "no folder":
        return path
    if what == "no config":
        path.mkdir()
        return path
    if what == "other model_type":
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
        return path
    if what == "unknown model_type":
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "hyena-9000"}))
        return path
    write_original(path, "mpt", "bin shards")
    if what == "no weights":
        for file in path.glob("pytorch_model*"):
            file.unlink()
    if what == "missing shard":
        (path / "pytorch_model-00002-of-00002.bin").unlink()
    if what == "config not JSON":
        (path / "config.json").write_text("{")
    return path


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no folder", "no-folder"),
        ("no config", "config.json"),
        ("config not JSON", "JSON"),
        ("other model_type", "mamba"),
        ("unknown model_type", "hyena-9000"),
        ("no weights", "no-weights"),
        ("missing shard", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_unusable_checkpoints_are_named(tmp_path, what: str, says: str) -> None:
    path = broken(tmp_path, what)
    with pytest.raises(InputError) as error:
        load_model(path, device="cpu")
    assert says in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "int3"), ("device", "tpu9"), ("device", "nonsense"), ("device", "cuda:77")],
)
def test_unknown_dtype_and_device_are_named(tmp_path, option: str, value: str) -> None:
    with pytest.raises(InputError, match=value):
        load_model(write_original(tmp_path / "m", "mpt", "bin"), **{option: value})


def test_models_that_do_not_generate_are_refused(stock) -> None:
    with pytest.raises(InputError, match="Model"):
        enable_keyformer(stock.transformer)
