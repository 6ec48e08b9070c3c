"""Small .gguf files, with random weights, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import torch
from families import small_model
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedModel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
}
"""What llama.cpp calls the parts of a Llama."""


def write_gguf(file: Path, vocab: int = 320) -> PreTrainedModel:
    """Write a small Llama with SmolLM2's special tokens, and return transformers' model of it."""
    model = small_model(
        "llama", vocab_size=vocab, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2
    )
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocab)
    _add_tokenizer(writer, vocab)
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        for part, heads in turned.items():
            if part in name:
                tensor = _interleaved(tensor, heads)
        if name != "lm_head.weight":  # tied
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A head's rows in llama.cpp's order: the two that RoPE turns together are neighbours."""
    rows = weight.shape[0] // heads
    halves = weight.reshape(heads, 2, rows // 2, -1).transpose(1, 2)
    return halves.reshape(weight.shape).contiguous()


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["the key tokens and the recent tokens"],
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    tokens += [f"<unused{i}>" for i in range(vocab - len(tokens))]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL else normal for token in tokens])
    merges = json.loads(trained.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
