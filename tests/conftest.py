"""Small models and checkpoints that the tests share."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; test_downloads has a hub of its own

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read on import: kernels run on the CPU, as numpy

import pytest
from families import small_model
from originals import ORIGINALS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from keyformer import KeyformerConfig, enable_keyformer
from keyformer.evaluation import flags

torch.set_num_threads(1)


def script(folder: str, name: str):
    """A script of a task folder as a module."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the most elements of a tensor that one gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.fixture(scope="session", params=ORIGINALS)
def arch(request) -> str:
    """Each of the paper's models: what takes it, or ``stock``, runs for all of them."""
    return request.param


def small_stock(arch: str, layers: int = 2, heads: int = 4, **changes: int) -> PreTrainedModel:
    """transformers' own model with random weights, large enough for logits to differ."""
    torch.manual_seed(0)
    original = ORIGINALS[arch]
    names = dict(zip(("d", "heads", "layers", "vocab"), original.small, strict=False))
    config = original.config(
        **{
            **original.small,
            names["layers"]: layers,
            names["heads"]: heads,
            names["vocab"]: 61,
            "use_cache": True,
            "initializer_range": 0.4,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "attn_implementation": "eager",
            **changes,
        }
    )
    dropout = {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    config.update({name: value for name, value in dropout.items() if hasattr(config, name)})
    return original.model(config).eval()


def small(name: str, **changes: Any) -> PreTrainedModel:
    """transformers' own model, small and random: one of the paper's, or of a family's."""
    return (small_stock if name in ORIGINALS else small_model)(name, **changes)


@functools.cache
def kept(name: str) -> PreTrainedModel:
    """:func:`small`, made once; by name, as tests name their models in lists of their own."""
    return small(name)


@pytest.fixture(scope="session")
def stock(arch) -> PreTrainedModel:
    """transformers' own model, small and random."""
    return small_stock(arch)


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


@pytest.fixture(autouse=True)
def store_of_its_own(monkeypatch, tmp_path_factory):
    """Every command of a test computes anew unless it names a --store; none writes into out/."""
    given = flags.store_flags

    def store_flags(parser, store) -> None:
        given(parser, store and tmp_path_factory.mktemp("store") / "finished.sqlite")

    monkeypatch.setattr(flags, "store_flags", store_flags)
