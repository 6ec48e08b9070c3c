"""A checkpoint that is not whole, or not what is computed, is one line; no results come of it."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Forked, script
from families import small_model
from originals import END, ORIGINALS, write_original, write_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MptForCausalLM, PreTrainedModel

from keyformer import InputError, KeyformerConfig, load_model
from keyformer.quantize import QUANTIZATIONS
from keyformer_evaluation.studies.sweep import carry_out
from keyformer_evaluation.tasks.flags import run_main

ROOT = Path(__file__).parents[1]
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n".encode()
Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str, str], Path]:
    """A function that writes an original checkpoint, once each."""
    folder = tmp_path_factory.mktemp("whole")

    def written(arch: str, weights: str) -> Path:
        path = folder / f"{arch} {weights}"
        small = {} if arch == "mpt" else {"n_positions": 32}
        return path if path.exists() else write_original(path, arch, weights, layers=3, **small)

    return written


@pytest.fixture
def copy(whole, tmp_path) -> Callable[..., Path]:
    """A function that gives a fresh copy of one, with changes to its fields."""

    def copied(arch: str = "mpt", weights: str = "safetensors", **fields: Any) -> Path:
        path = Path(shutil.copytree(whole(arch, weights), tmp_path / "checkpoint"))
        return set_fields(path / "config.json", **fields)

    return copied


def set_fields(file: Path, **fields: Any) -> Path:
    """The folder of a JSON file of which some fields are set."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return file.parent


def state(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A checkpoint whose tensors, by name, have been changed in place."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def refused(path: Path, *says: str, **options: Any) -> str:
    """What load_model says: one line about this checkpoint."""
    with pytest.raises(InputError) as error:
        load_model(path, **{"device": "cpu", **options})
    line = str(error.value)
    assert line.startswith(f"cannot load a model from {path}: ") and "\n" not in line
    for part in says:
        assert part in line
    return line


def same_logits(path: Path, stock: PreTrainedModel) -> bool:
    """Whether what load_model loads computes as transformers' model does."""
    config = KeyformerConfig.preset("full")
    model, _ = load_model(path, config, dtype="float32", device="cpu")
    inputs = torch.randint(1, 320, (2, 15))
    with torch.no_grad():
        return torch.allclose(model(inputs).logits, stock.eval()(inputs).logits, atol=1e-4)


# ---------------------------------------------------------------- A14: weights

QKV = "transformer.blocks.1.attn.Wqkv.weight"


def test_a14_missing_weights_are_named(copy) -> None:
    def drop(tensors):
        for block in range(3):
            for norm in ("norm_1", "norm_2"):
                del tensors[f"transformer.blocks.{block}.{norm}.weight"]

    line = refused(state(copy(), drop), "missing (6: transformer.blocks.0.norm_1.weight, ")
    assert "and 3 more" in line


def test_a14_unexpected_weights_are_named(copy) -> None:
    path = state(copy(), lambda t: t.update({"transformer.wpe.weight": torch.ones(4, 32)}))
    refused(path, "not of this model (1: transformer.wpe.weight)")


@pytest.mark.parametrize("arch", ORIGINALS)
def test_a14_weights_under_other_names_are_refused(copy, arch: str) -> None:
    def rename(tensors):
        for name in list(tensors):
            tensors[f"backbone.{name}"] = tensors.pop(name)

    refused(state(copy(arch), rename), "are missing (", "not of this model (", "backbone.")


def test_a14_weights_of_another_shape_are_named(copy) -> None:
    path = state(copy(), lambda t: t.update({QKV: t[QKV][:-1].clone()}))
    refused(path, f"another shape (1: {QKV} is (95, 32) and should be (96, 32))")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a14_weights_that_are_not_finite_are_named(copy, value: str) -> None:
    path = state(copy(), lambda t: t[QKV][3].fill_(float(value)))
    refused(path, f"NaN or infinite in 1: {QKV}")


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a14_quantized_weights_that_are_not_finite_are_named(copy, kind: str) -> None:
    path = state(copy(), lambda t: t[QKV][3, 5].fill_(float("nan")))
    refused(path, QKV.removesuffix("weight"), quantize=kind, dtype="bfloat16")


def test_a14_what_stays_on_disk_is_not_looked_at(copy, tmp_path) -> None:
    path = state(copy(), lambda t: t[QKV][3, 5].fill_(float("nan")))
    places = {"transformer.wte": "cpu", "transformer.norm_f": "cpu", "lm_head": "cpu"}
    places |= {f"transformer.blocks.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    model, _ = load_model(path, device_map=places, offload_folder=tmp_path / "off")
    assert model.transformer.blocks[1].attn.Wqkv.weight.is_meta


@pytest.mark.parametrize(
    ("family", "leftover"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt2", "transformer.h.1.attn.bias"),
    ],
)
def test_a14_leftovers_of_old_versions_are_fine(tmp_path, family: str, leftover: str) -> None:
    stock = small_model(family, vocab_size=320)
    stock.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "mpt", 320)
    state(tmp_path, lambda t: t.update({leftover: torch.ones(4)}))
    assert same_logits(tmp_path, stock)


def test_a14_quantized_checkpoint_loads_again(copy, tmp_path) -> None:
    model, tokenizer = load_model(copy(), quantize="bnb-4bit", device="cpu", dtype="bfloat16")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "again")
    again, _ = load_model(tmp_path / "again", device="cpu")
    assert torch.equal(again(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


# ---------------------------------------------------------------- A13: settings

OTHER_MPT = {
    "attn_config.alibi": False,
    "attn_config.attn_type": "multiquery_attention",
    "attn_config.attn_uses_sequence_id": True,
    "attn_config.attn_logit_softcapping": 30.0,
    "attn_config.prefix_lm": True,
    "attn_config.qk_gn": True,
    "attn_config.qk_ln": True,
    "attn_config.rope": True,
    "attn_config.sliding_window_size": 128,
    "block_overrides": {"order": [{"name": "default"}]},
    "expansion_ratio": 2,
    "ffn_config.ffn_act_fn": {"name": "silu"},
    "ffn_config.ffn_type": "mptglu",
    "final_logit_softcapping": 30.0,
    "logit_scale": "inv_sqrt_d_model",
    "no_bias": False,
    "norm_eps": 1e-6,
    "norm_type": "rmsnorm",
}


@pytest.mark.parametrize("field", OTHER_MPT)
def test_a13_settings_that_mpt_would_ignore_are_named(copy, field: str) -> None:
    path, value = copy(), OTHER_MPT[field]
    *within, name = field.split(".")
    fields = {name: value}
    for outer in within:
        settings = json.loads((path / "config.json").read_text())
        fields = {outer: {**settings.get(outer, {}), name: value}}
    set_fields(path / "config.json", **fields)
    refused(path, f"config.json: {field} must be ", f", got {value!r}")


def test_a13_grouped_queries_are_named(copy) -> None:
    attention = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
    refused(copy(attn_config=attention), "attn_type", "grouped_query_attention")


@pytest.mark.parametrize(
    "same",
    [
        {"norm_type": "layernorm", "learned_pos_emb": False, "norm_eps": 1e-5},
        {"attn_config": {"alibi": True, "attn_impl": "triton", "rope": False}},
        {"attn_config": {"alibi": True, "attn_impl": "flash", "sliding_window_size": -1}},
        {"ffn_config": {"ffn_type": "mptmlp", "fc_type": "torch"}, "logit_scale": None},
        {"attn_config": None},
    ],
)
def test_a13_settings_that_change_nothing_load(copy, same: dict[str, Any]) -> None:
    path = copy()
    stock = MptForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert same_logits(set_fields(path / "config.json", **same), stock)


def test_a13_an_mpt_with_a_head_of_its_own_is_computed(copy) -> None:
    """tie_word_embeddings false is no setting that is ignored; but there must be a head."""
    path = copy(tie_word_embeddings=False)
    refused(path, "missing (1: lm_head.weight)")
    state(path, lambda t: t.update({"lm_head.weight": torch.randn(320, 32)}))
    stock = MptForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert not torch.equal(stock.lm_head.weight, stock.transformer.wte.weight)
    assert same_logits(path, stock)


NEW = {"new_decoder_architecture": True}


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [
        ("gptj", {"rotary": False}, "rotary must be true, got False"),
        ("gptj", {"scale_attn_weights": False}, "scale_attn_weights must be true, got False"),
        ("gpt2", {"add_cross_attention": True}, "encoder"),
        ("gpt2", {"is_encoder_decoder": True}, "encoder"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact must be false"),
        ("falcon", {"apply_residual_connection_post_layernorm": True}, "post_layernorm must be"),
        ("falcon", {**NEW, "parallel_attn": False}, "parallel_attn must be true, got False"),
        ("falcon", {**NEW, "num_ln_in_parallel_attn": 3}, "must be null or 1 or 2, got 3"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "must be null or 1, got 2"),
    ],
)
def test_a13_settings_that_others_would_ignore_are_named(tmp_path, family, settings, says) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **settings}))
    refused(tmp_path, says)


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    ],
)
def test_a13_settings_of_gpt2_are_computed(tmp_path, settings: dict[str, Any]) -> None:
    small = {**ORIGINALS["cerebras"].small, "n_positions": 32, "initializer_range": 0.4}
    stock = GPT2LMHeadModel(GPT2Config(**small, **settings))
    stock.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "cerebras", 320)
    assert same_logits(tmp_path, stock)


# ---------------------------------------------------------------- B4: files


def put(name: str, content: bytes | str) -> Edit:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / name).write_bytes(data)


def cut(name: str) -> Edit:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-999])


def remove(*names: str) -> Edit:
    return lambda path: [(path / name).unlink() for name in names]


def fields(**changes: Any) -> Edit:
    return lambda path: set_fields(path / "config.json", **changes)


def index(**content: Any) -> Edit:
    return put("model.safetensors.index.json", json.dumps(content))


ONE, BIN = "model.safetensors", "pytorch_model.bin"
SHARD, BIN_SHARD = "model-00002-of-00002.safetensors", "pytorch_model-00002-of-00002.bin"
INDEX = "model.safetensors.index.json"
WEIGHTS = {
    "cut": ("safetensors", cut(ONE), f"{ONE} cannot be read"),
    "empty": ("safetensors", put(ONE, b""), f"{ONE} is empty"),
    "pointer": ("safetensors", put(ONE, POINTER), f"{ONE} is a Git LFS pointer"),
    "garbage": ("safetensors", put(ONE, bytes(range(256)) * 9), f"{ONE} cannot be read"),
    "header": ("safetensors", put(ONE, b"\x08" + bytes(7) + b"{'no': 1"), f"{ONE} cannot be read"),
    "no weights": ("safetensors", remove(ONE), "safetensors"),
    "bin cut": ("bin", cut(BIN), f"{BIN} is cut off"),
    "bin empty": ("bin", put(BIN, b""), f"{BIN} is empty"),
    "bin pointer": ("bin", put(BIN, POINTER), f"{BIN} is a Git LFS pointer"),
    "bin garbage": ("bin", put(BIN, bytes(range(256)) * 9), f"{BIN} is cut off or no file of"),
    "bin other pickle": ("bin", put(BIN, pickle.dumps(print)), f"{BIN} is cut off or no file of"),
    "bin list": ("bin", lambda path: torch.save([1, 2], path / BIN), f"{BIN} does not hold tensor"),
    "bin number": ("bin", lambda path: torch.save({QKV: 3}, path / BIN), f"{BIN} does not hold"),
    "bin shard cut": ("bin shards", cut(BIN_SHARD), f"{BIN_SHARD} is cut off"),
    "shard cut": ("safetensors shards", cut(SHARD), f"{SHARD} cannot be read"),
    "shard missing": ("safetensors shards", remove(SHARD), SHARD),
    "index list": ("safetensors shards", put(INDEX, "[]"), f"{INDEX} must hold a JSON object"),
    "index cut": ("safetensors shards", cut(INDEX), f"{INDEX} is not JSON"),
    "index without map": ("safetensors shards", index(metadata={}), f"{INDEX}: weight_map must"),
    "map a list": ("safetensors shards", index(weight_map=[]), f"{INDEX}: weight_map must"),
    "map of numbers": ("safetensors shards", index(weight_map={"a": 3}), "same folder, got 3"),
    "no metadata": ("safetensors shards", index(weight_map={"a": SHARD}), f"{INDEX} has no meta"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_b4_broken_weights_are_named(copy, case: str) -> None:
    weights, edit, says = WEIGHTS[case]
    path = copy(weights=weights)
    edit(path)
    refused(path, says)


CONFIG = "config.json"
CONFIGS = {
    "list": (put(CONFIG, "[]"), "config.json must hold a JSON object, got []"),
    "null": (put(CONFIG, "null"), "config.json must hold a JSON object, got null"),
    "text": (put(CONFIG, '"mpt"'), 'config.json must hold a JSON object, got "mpt"'),
    "empty": (put(CONFIG, ""), "config.json is empty"),
    "pointer": (put(CONFIG, POINTER), "config.json is a Git LFS pointer"),
    "not JSON": (put(CONFIG, "{'d_model': 32}"), "config.json is not JSON"),
    "not UTF-8": (put(CONFIG, b'{"model_type": "\xff"}'), "config.json is not JSON"),
    "nested": (put(CONFIG, "[" * 100_000), "config.json is not JSON"),
    "no model_type": (put(CONFIG, "{}"), "model_type"),
    "model_type number": (fields(model_type=3), "model_type must be a name, got 3"),
    "model_type list": (fields(model_type=["mpt"]), "model_type must be a name, got ['mpt']"),
    "heads text": (fields(n_heads="four"), "n_heads"),
    "heads zero": (fields(n_heads=0), "n_heads must be at least 1, got 0"),
    "heads negative": (fields(n_heads=-4), "n_heads must be at least 1, got -4"),
    "heads that do not divide": (fields(n_heads=3), "n_heads must divide 32, got 3"),
    "width list": (fields(d_model=[32]), "d_model"),
    "no layers": (fields(n_layers=0), "n_layers must be at least 1, got 0"),
    "layers negative": (fields(n_layers=-1), "n_layers must be at least 1, got -1"),
    "layers true": (fields(n_layers=True), "n_layers"),
    "layers more": (fields(n_layers=4), "missing (6: transformer.blocks.3."),
    "layers fewer": (fields(n_layers=2), "not of this model (6: transformer.blocks.2."),
    "vocabulary zero": (fields(vocab_size=0), "vocab_size must be at least 1, got 0"),
    "vocabulary larger": (fields(vocab_size=321), "transformer.wte.weight is (320, 32)"),
    "positions": (fields(max_seq_len=0), "max_seq_len must be at least 1, got 0"),
    "epsilon negative": (fields(layer_norm_epsilon=-1.0), "layer_norm_epsilon must be at least 0"),
    "epsilon NaN": (fields(layer_norm_epsilon=float("nan")), "layer_norm_epsilon must be at"),
    "epsilon text": (fields(layer_norm_epsilon="1e-5"), "layer_norm_epsilon"),
    "attention number": (fields(attn_config=3), "attn_config must be an object, got 3"),
    "attention list": (fields(attn_config=[1]), "attn_config must be an object, got [1]"),
    "clip text": (fields(attn_config={"clip_qkv": "six"}), "clip_qkv"),
    "clip list": (fields(attn_config={"clip_qkv": [6]}), "clip_qkv"),
    "dtype": (fields(torch_dtype="float33"), "float33"),
    "dtype list": (fields(dtype=[1]), "config.json: "),
    "labels": (fields(id2label=3), "config.json: "),
    "end token": (fields(eos_token_id="end"), "eos_token_id"),
    "quantization": (fields(quantization_config="four bits"), "config.json: "),
    "quantization lacks a field": (fields(quantization_config={"quant_method": "gptq"}), "GPTQ"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_b4_broken_configuration_is_named(copy, case: str) -> None:
    edit, says = CONFIGS[case]
    path = copy()
    edit(path)
    refused(path, says)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("activation_function", "gelu_newer", "gelu_newer"),
        ("n_inner", -3, "n_inner must be at least 1"),
        ("n_positions", 0, "n_positions must be at least 1"),
        ("n_head", 5, "n_head must divide 32, got 5"),
        ("rotary_dim", 0, "rotary_dim must be at least 1"),
        ("rotary_dim", 3, "rotary_dim must be even and at most 8, got 3"),
        ("rotary_dim", 64, "rotary_dim must be even and at most 8, got 64"),
        ("rotary_dim", None, "rotary_dim"),
    ],
)
def test_b4_broken_configuration_of_gptj_is_named(copy, field: str, value: Any, says: str) -> None:
    refused(copy("gptj", **{field: value}), says)


def test_b4_key_value_heads_that_do_not_divide_are_named(tmp_path) -> None:
    settings = {"model_type": "mistral", "num_attention_heads": 4, "num_key_value_heads": 3}
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "hidden_size": 32}))
    refused(tmp_path, "num_key_value_heads")


JSON, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TOKENIZERS = {
    "cut": ("mpt", cut(JSON), f"{JSON} is not JSON"),
    "empty": ("mpt", put(JSON, ""), f"{JSON} is empty"),
    "pointer": ("mpt", put(JSON, POINTER), f"{JSON} is a Git LFS pointer"),
    "list": ("mpt", put(JSON, "[]"), f"{JSON} must hold a JSON object"),
    "no model": ("mpt", put(JSON, '{"added_tokens": []}'), "the tokenizer: "),
    "wrong model": ("mpt", put(JSON, '{"model": {}, "added_tokens": 3}'), "the tokenizer: "),
    "missing": ("mpt", remove(JSON), "tokenizer's files are missing"),
    "all missing": ("mpt", remove(JSON, SETTINGS, SPECIAL), "tokenizer's files are missing"),
    "settings list": ("mpt", put(SETTINGS, "[]"), f"{SETTINGS} must hold a JSON object"),
    "settings cut": ("mpt", put(SETTINGS, '{"eos'), f"{SETTINGS} is not JSON"),
    "class a number": ("mpt", put(SETTINGS, '{"tokenizer_class": 3}'), "the tokenizer: "),
    "length a text": ("mpt", put(SETTINGS, '{"model_max_length": "x"}'), "the tokenizer: "),
    "added a number": ("mpt", put(SETTINGS, '{"added_tokens_decoder": 3}'), "the tokenizer: "),
    "special list": ("mpt", put(SPECIAL, "[1]"), f"{SPECIAL} must hold a JSON object"),
    "special garbage": ("mpt", put(SPECIAL, b"\xff\xfe"), f"{SPECIAL} is not JSON"),
    "vocabulary list": ("gptj", put("vocab.json", "[]"), "vocab.json must hold a JSON object"),
    "vocabulary empty": ("gptj", put("vocab.json", ""), "vocab.json is empty"),
    "vocabulary missing": ("gptj", remove("vocab.json"), "the tokenizer: "),
    "merges missing": ("gptj", remove("merges.txt"), "the tokenizer: "),
    "merges empty": ("gptj", put("merges.txt", ""), "merges.txt is empty"),
    "merges garbage": ("gptj", put("merges.txt", b"\xff"), "the tokenizer: "),
    "vocabulary and merges": ("gptj", remove("vocab.json", "merges.txt"), "files are missing"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_b4_broken_tokenizers_are_named(copy, case: str) -> None:
    arch, edit, says = TOKENIZERS[case]
    path = copy(arch)
    edit(path)
    refused(path, says)


def test_b4_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path) -> None:
    path = write_original(tmp_path / "small", "mpt", "safetensors", vocab_size=250)
    refused(path, "the tokenizer has token 2", "vocab_size is 250")


@pytest.mark.parametrize(("special", "fits"), [(True, True), (False, False)])
def test_b4_added_tokens_beyond_the_embeddings(copy, special: bool, fits: bool) -> None:
    """Models of a family share a tokenizer, whose token for an image may have no embedding."""
    path = copy()
    settings = json.loads((path / JSON).read_text())
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added |= {"id": 320, "content": "<image>", "special": special}
    set_fields(path / JSON, added_tokens=[*settings["added_tokens"], added])
    # The id follows the vocabulary's, which has to reach as far.
    vocabulary = settings["model"]["vocab"]
    filling = {f"<{i}>": i for i in range(len(vocabulary), 320)}
    set_fields(path / JSON, model={**settings["model"], "vocab": {**vocabulary, **filling}})
    set_fields(path / SETTINGS, pad_token=END)
    if fits:
        load_model(path, device="cpu")
    else:
        refused(path, "token 320 ('<image>')")


GENERATION = "generation_config.json"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (POINTER, "is a Git LFS pointer"),
        ("[]", "must hold a JSON object"),
        ('{"eos_token_id": "end"}', "eos_token_id must be a token's number"),
        ('{"eos_token_id": [[0]]}', "eos_token_id must be a token's number"),
        ('{"pad_token_id": 0.5}', "pad_token_id must be a token's number"),
        ('{"temperature": "hot"}', "temperature must be a number"),
        ('{"temperature": -1}', "temperature must be a number, at least 0, got -1"),
        ('{"num_beams": 0}', "num_beams must be a whole number, at least 1, got 0"),
        ('{"max_new_tokens": "many"}', "max_new_tokens must be a whole number"),
        ('{"do_sample": "maybe"}', "do_sample must be true or false, got 'maybe'"),
        ('{"cache_implementation": "none"}', "cache_implementation"),
        ('{"watermarking_config": 3}', ": AttributeError"),
        ('{"repetition_penalty": 0}', "repetition_penalty 0: "),
        ('{"encoder_repetition_penalty": 0}', "encoder_repetition_penalty 0: "),
        ('{"stop_strings": 5}', "stop_strings 5: "),
        ('{"max_time": "x", "top_k": 4}', 'max_time "x": '),
        ('{"sequence_bias": 5}', "sequence_bias 5: "),
        ('{"exponential_decay_length_penalty": [1]}', "exponential_decay_length_penalty [1]: "),
        ('{"penalty_alpha": 0.5, "top_k": 4}', "penalty_alpha 0.5: "),
        ('{"dola_layers": "low"}', 'dola_layers "low": '),
        ('{"num_return_sequences": 3, "num_beams": 2}', "num_return_sequences 3: "),
    ],
)
def test_b4_broken_generation_settings_are_named(copy, content: bytes | str, says: str) -> None:
    path = copy()
    put(GENERATION, content)(path)
    assert says in refused(path, GENERATION)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "penalty_alpha": 0.5},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 2.0},
        {"stop_strings": ["end"], "repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        {"use_cache": False, "max_length": 1, "min_length": 30, "output_attentions": True},
        {"cache_implementation": "static", "suppress_tokens": [3], "forced_eos_token_id": 0},
    ],
)
def test_generation_settings_that_can_be_used_are_taken(copy, settings) -> None:
    """And nothing is drawn from torch's generator on the way."""
    path = copy()
    set_fields(path / GENERATION, **settings)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    model, _ = load_model(path, device="cpu")
    assert torch.equal(torch.rand(1), expected)
    assert {name: getattr(model.generation_config, name) for name in settings} == {
        **settings,
        **({"use_cache": True} if "use_cache" in settings else {}),
    }


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()])
def test_b4_what_is_not_the_files_fault_is_no_input_error(copy, monkeypatch, error) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("mpt_keyformer.MptKeyformerForCausalLM.from_pretrained", fail)
    with pytest.raises(type(error)):
        load_model(copy(), device="cpu")


def test_b4_unknown_arguments_are_the_callers(copy) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        load_model(copy(), device="cpu", no_such_argument=1)


def test_b4_a_foreign_pickle_is_refused_without_torchs_warning(copy, recwarn) -> None:
    path = copy(weights="bin")
    put(BIN, pickle.dumps({"a": 1}, protocol=4))(path)
    refused(path, BIN)
    assert not [warned for warned in recwarn if "pickle" in str(warned.message)]


def test_b4_transformers_warns_of_whole_checkpoints_only(copy) -> None:
    """What it prints while it loads a broken one does not stand beside the one line."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    try:
        path = copy(eos_token_id=99_999)  # worth a warning
        load_model(path, device="cpu")
        assert len(said) == 1 and "99999" in said[0]
        said.clear()
        refused(state(path, lambda tensors: tensors.pop(QKV)))
        assert not said
    finally:
        library.removeHandler(handler)
    assert all(not handler.filters for handler in library.handlers)


# ---------------------------------------------------------------- B5: shards elsewhere


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("place", ["../{}", "x/../../{}", "{folder}/{}", "..\\{}", "C:\\{}"])
def test_b5_shards_outside_the_folder_are_refused(copy, weights: str, place: str) -> None:
    """They are whole: nothing but their place is wrong."""
    path = copy(weights=f"{weights} shards")
    found = next(path.glob("*.index.json"))
    content = json.loads(found.read_text())
    names = {}
    for shard in set(content["weight_map"].values()):
        names[shard] = place.format(shard, folder=path.parent)
        shutil.copy(path / shard, path.parent / shard)
    content["weight_map"] = {name: names[shard] for name, shard in content["weight_map"].items()}
    found.write_text(json.dumps(content))
    for shard in names:
        (path / shard).write_bytes(b"must not be read")
    refused(path, found.name, "must be one in the same folder, got ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"weight_map": {"a": "../../x"}}, "../../x"),
        ({"weight_map": ["a"]}, "weight_map"),
        ([], "JSON object"),
    ],
)
def test_b5_downloads_refuse_such_an_index(tmp_path, monkeypatch, content: Any, says: str) -> None:
    monkeypatch.syspath_prepend(ROOT / "models" / "model_download")  # as where it is a script
    download_model = script("models/model_download", "download_model")
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(InputError, match="is broken") as error:
        download_model.verify(tmp_path, {CONFIG: None, INDEX: None})
    assert says in str(error.value)


# ---------------------------------------------------------------- scripts

INTERACTIVE = ["--interactive", "--narrative", "N", "--speakers", "A", "B"]
SCRIPTS: dict[str, tuple[str, str, list[str]]] = {
    "summarize": ("summarization", "summarize", ["--n_obs", "1"]),
    "summaries compared": ("summarization", "compare", ["--n_obs", "1"]),
    "dialogue": ("conversation", "dialogue", ["--n_obs", "1"]),
    "dialogues compared": ("conversation", "compare", ["--n_obs", "1"]),
    "chat": ("conversation", "dialogue", INTERACTIVE),
    "harness": ("lm_eval_harness", "run_lm_eval_harness", ["--tasks", "tiny_copa"]),
    "kept tokens": ("paper", "kept_tokens", []),
    "study": ("paper", "fig4", ["--n_obs", "1", "--seeds", "0"]),
    "long prompt": ("benchmarks", "long_prompt", []),
    "quantized weights": ("benchmarks", "quantized_weights", ["--n_obs", "1"]),
}


@pytest.fixture(scope="module")
def without_norm(whole, tmp_path_factory) -> Path:
    """A checkpoint that lacks a tensor."""
    path = shutil.copytree(whole("mpt", "safetensors"), tmp_path_factory.mktemp("x") / "lacks")
    return state(Path(path), lambda tensors: tensors.pop("transformer.norm_f.weight"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_b4_in_every_script_it_is_one_line(
    name: str, without_norm, tmp_path, monkeypatch, capfd
) -> None:
    folder, file, flags = SCRIPTS[name]
    main = script(folder, file).main
    argv = ["--model_path", str(without_norm), "--device", "cpu", *flags]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{file}.py", *argv])
    run = (lambda _: carry_out([main(argv)])) if name == "study" else (lambda _: main(argv))
    with pytest.raises(SystemExit) as stopped:
        run_main(run)
    printed = capfd.readouterr().err.splitlines()
    lines = [line for line in printed if line and "item/s" not in line]  # a study's progress bar
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"{file}.py: error: cannot load a model from ")
    assert "transformer.norm_f.weight" in lines[0]


def test_b4_a_script_as_a_process_says_one_line(without_norm, tmp_path) -> None:
    command = [str(ROOT / "summarization" / "summarize.py"), "--device", "cpu"]
    command += ["--model_path", str(without_norm), "--n_obs", "1"]
    code, printed, errors = Forked(command, tmp_path).wait()
    lines = errors.splitlines()
    assert code == 2 and not printed
    assert "missing (1: transformer.norm_f.weight)" in lines[-1]
    for noise in ("Traceback", "LOAD REPORT", "MISSING", "Loading weights"):
        assert noise not in errors


def test_b4_lm_evals_model_is_refused_alike(without_norm) -> None:
    from keyformer_lm_eval.model import KeyformerLM

    with pytest.raises(InputError, match=r"transformer\.norm_f\.weight"):
        KeyformerLM(str(without_norm), device="cpu")
