"""Small checkpoints in the exact format of the originals, with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

State = dict[str, torch.Tensor]
END = "<|endoftext|>"
SENTENCE = "the key tokens and the recent tokens"

MPT_7B = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {
        "AutoConfig": "configuration_mpt.MPTConfig",
        "AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM",
    },
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {
        "emb_init_std": None,
        "emb_init_uniform_lim": None,
        "fan_mode": "fan_in",
        "init_div_is_residual": True,
        "init_gain": 0,
        "init_nonlinearity": "relu",
        "init_std": 0.02,
        "name": "kaiming_normal_",
        "verbose": 0,
    },
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
"""The fields of mosaicml/mpt-7b's config.json."""

GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {
        "text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}
    },
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
    "use_cache": True,
    "vocab_size": 50400,
}
"""The fields of EleutherAI/gpt-j-6B's config.json."""

CEREBRAS_GPT_6_7B = {
    "activation_function": "gelu",
    "architectures": ["GPT2Model"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "embd_pdrop": 0.0,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_embd": 4096,
    "n_head": 32,
    "n_inner": 16384,
    "n_layer": 32,
    "n_positions": 2048,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torch_dtype": "float32",
    "transformers_version": "4.27.2",
    "use_cache": True,
    "vocab_size": 50257,
}
"""The fields of the config.json of cerebras' GPT models."""


class Weights:
    """Draws random tensors for a state dict."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(0), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * 0.3).to(self.dtype)


def mpt_state(config: dict[str, Any]) -> State:
    """mpt-7b's names: no biases, tied head."""
    normal, d = Weights(torch.bfloat16), config["d_model"]
    state = {"transformer.wte.weight": normal(config["vocab_size"], d)}
    for i in range(config["n_layers"]):
        block = f"transformer.blocks.{i}."
        state[block + "norm_1.weight"] = normal(d) + 1
        state[block + "attn.Wqkv.weight"] = normal(3 * d, d)
        state[block + "attn.out_proj.weight"] = normal(d, d)
        state[block + "norm_2.weight"] = normal(d) + 1
        state[block + "ffn.up_proj.weight"] = normal(4 * d, d)
        state[block + "ffn.down_proj.weight"] = normal(d, 4 * d)
    state["transformer.norm_f.weight"] = normal(d) + 1
    return state


def causal_buffers(prefix: str, positions: int) -> State:
    """The mask that old versions of transformers saved with every attention layer."""
    mask = torch.ones(positions, positions, dtype=torch.bool).tril()
    return {prefix + "bias": mask[None, None], prefix + "masked_bias": torch.tensor(-1e9)}


def gptj_state(config: dict[str, Any]) -> State:
    """gpt-j-6B's names: one norm a block, causal masks, an untied head with a bias."""
    normal, d, vocab = Weights(torch.float16), config["n_embd"], config["vocab_size"]
    state = {"transformer.wte.weight": normal(vocab, d)}
    for i in range(config["n_layer"]):
        block = f"transformer.h.{i}."
        state |= {block + "ln_1.weight": normal(d) + 1, block + "ln_1.bias": normal(d)}
        state |= causal_buffers(block + "attn.", config["n_positions"])
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            state[block + f"attn.{name}.weight"] = normal(d, d)
        for name, rows, columns in (("fc_in", 4 * d, d), ("fc_out", d, 4 * d)):
            state[block + f"mlp.{name}.weight"] = normal(rows, columns)
            state[block + f"mlp.{name}.bias"] = normal(rows)
    state |= {"transformer.ln_f.weight": normal(d) + 1, "transformer.ln_f.bias": normal(d)}
    if not config["tie_word_embeddings"]:
        state["lm_head.weight"] = normal(vocab, d)
    return state | {"lm_head.bias": normal(vocab)}


def cerebras_state(config: dict[str, Any]) -> State:
    """Cerebras-GPT's names: those of GPT-2 without its head, weights stored input first."""
    normal, d = Weights(torch.float32), config["n_embd"]
    state = {"wte.weight": normal(config["vocab_size"], d)}
    state["wpe.weight"] = normal(config["n_positions"], d)
    inner = config["n_inner"]
    for i in range(config["n_layer"]):
        block = f"h.{i}."
        for norm in ("ln_1", "ln_2"):
            state |= {block + f"{norm}.weight": normal(d) + 1, block + f"{norm}.bias": normal(d)}
        state |= causal_buffers(block + "attn.", config["n_positions"])
        for name, rows, columns in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, inner),
            ("mlp.c_proj", inner, d),
        ):
            state[block + name + ".weight"] = normal(rows, columns)
            state[block + name + ".bias"] = normal(columns)
    state |= {"ln_f.weight": normal(d) + 1, "ln_f.bias": normal(d)}
    if not config.get("tie_word_embeddings", True):
        state = {f"transformer.{name}": tensor for name, tensor in state.items()}
        state["lm_head.weight"] = normal(config["vocab_size"], d)
    return state


@dataclass(frozen=True)
class Original:
    """One of the paper's models.

    Attributes
    ----------
    fields
        Its config.json.
    small
        The fields that make it small.
    state
        Random weights for a configuration, under the original's names.
    config, model
        transformers' classes of it.
    block
        The name of its i-th layer.
    has_table
        Whether its positions come from a table.
    """

    fields: dict[str, Any]
    small: dict[str, Any]
    state: Callable[[dict[str, Any]], State]
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    block: str
    has_table: bool


GPT_SMALL = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 320, "n_positions": 2048}
ORIGINALS = {
    "mpt": Original(
        MPT_7B,
        {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 320},
        mpt_state,
        MptConfig,
        MptForCausalLM,
        "transformer.blocks.{}",
        has_table=False,
    ),
    "gptj": Original(
        GPT_J_6B,
        {**GPT_SMALL, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 0},
        gptj_state,
        GPTJConfig,
        GPTJForCausalLM,
        "transformer.h.{}",
        has_table=True,
    ),
    "cerebras": Original(
        CEREBRAS_GPT_6_7B,
        {**GPT_SMALL, "n_inner": 128, "bos_token_id": 0, "eos_token_id": 0},
        cerebras_state,
        GPT2Config,
        GPT2LMHeadModel,
        "transformer.h.{}",
        has_table=True,
    ),
}


def write_original(
    folder: Path,
    name: str,
    weights: str,
    layers: int = 2,
    texts: str = SENTENCE,
    **changes: Any,
) -> Path:
    """A small checkpoint in an original's format: config fields, state-dict names and files.

    ``weights`` is "bin" or "safetensors", with " shards" for two files; ``changes`` are fields
    of config.json.
    """
    folder.mkdir(parents=True)
    original = ORIGINALS[name]
    of_layers = "n_layers" if name == "mpt" else "n_layer"
    config = {**original.fields, **original.small, of_layers: layers, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for file in config.get("auto_map", {}).values():
        module = file.split(".")[0]
        (folder / f"{module}.py").write_text("raise RuntimeError('remote code was run')\n")
    write_weights(folder, original.state(config), weights)
    write_tokenizer(folder, name, config["vocab_size"], texts)
    return folder


def write_tokenizer(folder: Path, name: str, vocab_size: int, texts: str = SENTENCE) -> None:
    """A small BPE tokenizer in the files that the original has, made for these texts."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        [texts],
        vocab_size=vocab_size - 8,  # room for tokens that are added later
        special_tokens=[END],
        show_progress=False,
    )
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    settings: dict[str, Any] = {**special, "add_prefix_space": False, "model_max_length": 2048}
    generation: dict[str, Any] = {"_from_model_config": True, "eos_token_id": 0}
    if name == "mpt":
        tokenizer.save(str(folder / "tokenizer.json"))
        settings["tokenizer_class"] = "GPTNeoXTokenizer"
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        generation["use_cache"] = False
    else:
        tokenizer.save_model(str(folder))
        settings["tokenizer_class"] = "GPT2Tokenizer"
        settings["name_or_path"] = "gpt2"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if name != "gptj":  # which has none
        (folder / "generation_config.json").write_text(json.dumps(generation))


def write_weights(folder: Path, state: State, weights: str) -> None:
    """Write a state dict as one file or two shards, pickled (.bin) or as .safetensors."""
    stem, ending = ("pytorch_model", "bin") if "bin" in weights else ("model", "safetensors")
    save = torch.save if ending == "bin" else (lambda s, p: save_file(s, p, {"format": "pt"}))
    if "shards" not in weights:
        save(state, folder / f"{stem}.{ending}")
        return
    names = list(state)
    half = len(names) // 2
    where = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{ending}"
        save({name: state[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    size = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
