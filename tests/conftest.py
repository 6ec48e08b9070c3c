"""Small models and checkpoints that the tests share."""

from __future__ import annotations

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; test_downloads has a hub of its own

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from keyformer import KeyformerConfig, enable_keyformer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def stock() -> MptForCausalLM:
    """transformers' own MPT with random weights, large enough for logits to differ."""
    torch.manual_seed(0)
    config = MptConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=61,
        max_seq_len=256,
        use_cache=True,
        initializer_range=0.4,
        eos_token_id=0,
        pad_token_id=0,
    )
    return MptForCausalLM(config).eval()


@pytest.fixture
def evicting(stock):
    """A function from a configuration to a copy of the stock model that evicts by it."""
    return lambda config=None: enable_keyformer(copy.deepcopy(stock), config)


@pytest.fixture
def full() -> KeyformerConfig:
    return KeyformerConfig.preset("full")


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts of 13, 24 and 21 tokens."""
    torch.manual_seed(1)
    input_ids = torch.randint(1, 61, (3, 24))
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((11, 0, 3)):
        attention_mask[row, :padding] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}
