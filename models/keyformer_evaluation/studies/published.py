"""The paper's models, so that its numbers stand beside theirs and no others'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from keyformer.checkpoint import read_object

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MPT-7B": (
        "mosaicml/mpt-7b",
        {"model_type": "mpt", "n_layers": 32, "d_model": 4096, "max_seq_len": 2048},
    ),
    "GPT-J-6B": ("EleutherAI/gpt-j-6B", {"model_type": "gptj", "n_layer": 28, "n_embd": 4096}),
    "Cerebras-GPT-6.7B": (
        "cerebras/Cerebras-GPT-6.7B",
        {"model_type": "gpt2", "n_layer": 32, "n_embd": 4096},
    ),
}
"""Each one's name on the hub, and what of its config.json tells it from others."""


def papers_model(path: str) -> str | None:
    """Which of the paper's models a checkpoint is, or one of its shape; None if it is neither.

    Where download_model.py has noted what it fetched, that counts too: mosaicml/mpt-7b-chat is
    told from mosaicml/mpt-7b by nothing else.
    """
    config = _read(path, "config.json")
    fetched = _read(path, "download_info.json").get("model_name")
    for model, (name, fields) in MODELS.items():
        if fields.items() <= config.items() and fetched in (None, name):
            return model
    return None


def _read(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint, in a folder or from the hub; empty if it has none."""
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    return read_object(Path(file)) if file else {}
