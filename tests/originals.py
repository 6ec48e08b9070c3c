"""Small checkpoints in the exact format of the originals, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer

MPT_7B_CONFIG = {
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


def write_mpt(folder: Path, weights: str, **changes) -> Path:
    """A small checkpoint in mpt-7b's format: its config fields, state-dict names and files."""
    folder.mkdir(parents=True)
    small = {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 320, **changes}
    (folder / "config.json").write_text(json.dumps({**MPT_7B_CONFIG, **small}))
    generation = {"_from_model_config": True, "eos_token_id": 0, "use_cache": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "modeling_mpt.py").write_text("raise RuntimeError('remote code was run')\n")
    (folder / "configuration_mpt.py").write_text("raise RuntimeError('remote code was run')\n")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.3).to(torch.bfloat16)

    d = small["d_model"]
    state = {"transformer.wte.weight": normal(small["vocab_size"], d)}
    for i in range(small["n_layers"]):
        block = f"transformer.blocks.{i}."
        state[block + "norm_1.weight"] = normal(d) + 1
        state[block + "attn.Wqkv.weight"] = normal(3 * d, d)
        state[block + "attn.out_proj.weight"] = normal(d, d)
        state[block + "norm_2.weight"] = normal(d) + 1
        state[block + "ffn.up_proj.weight"] = normal(4 * d, d)
        state[block + "ffn.down_proj.weight"] = normal(d, 4 * d)
    state["transformer.norm_f.weight"] = normal(d) + 1
    write_weights(folder, state, weights)

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["the key tokens and the recent tokens"],
        vocab_size=small["vocab_size"],
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    end = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_prefix_space": False,
                "bos_token": end,
                "eos_token": end,
                "model_max_length": 2048,
                "tokenizer_class": "GPTNeoXTokenizer",
                "unk_token": end,
            }
        )
    )
    special = {"bos_token": end, "eos_token": end, "unk_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def write_weights(folder: Path, state: dict[str, torch.Tensor], weights: str) -> None:
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
