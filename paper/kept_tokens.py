"""One document and its generated text as a web page: which tokens the cache holds, step by step.

Each token is shaded by how many layers and heads hold it; there is a slider over decode steps, a
choice of layer and head, and the token's score under the mouse. The page is one file.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import keyformer  # noqa: F401 - before transformers, to keep it quiet

# isort: split
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keyformer.cache import KeyformerCache
from keyformer.config import InputError, KeyformerConfig
from keyformer_evaluation.records.results import check_replaceable, check_writable, write_text
from keyformer_evaluation.studies.study import BUNDLED, ROOT
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.data import TASKS, load_items, make_prompt, prompt_room
from keyformer_evaluation.tasks.run import load

TEMPLATE = Path(__file__).with_suffix(".html")

MOST_STEPS = 2**16 - 1
"""The page counts steps in 16 bits."""

MOST_SCORES = 2_000_000
"""Scores on a page: beyond that, only every so many steps' are on it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Generate one text and write its page."""
    flags = parse(argv)
    method, config = flag.method_config(flags)
    config = replace(config, seed=flags.seed)
    task = TASKS[flags.task]
    path = flags.dataset_path or BUNDLED[flags.task]
    items = load_items(path, task)
    if flags.item >= len(items):
        raise InputError(f"--item must be from 0 to {len(items) - 1}, got {flags.item}")
    check_writable(flags.out)
    check_replaceable(flags.out, is_page(flags.out))
    model, tokenizer = load(flags)
    new_tokens = flags.max_new_tokens or task.max_new_tokens
    prompt = make_prompt(items[flags.item], task, tokenizer, prompt_room(model, new_tokens))
    data = follow(model, tokenizer, prompt, config, new_tokens)
    size = "everything kept" if method == "full" else f"{config.kv_cache:g} % of the prompt"
    model_name = Path(flag.model_path(flags)).name
    data["about"] = f"{model_name}, {flags.task}, item {flags.item}; method {method}, {size}."
    template = TEMPLATE.read_text()
    # "</script>" in a text would end the page's data.
    page = template.replace("DATA", json.dumps(data).replace("</", "<\\/"), 1)
    write_text(flags.out, page)
    print(f"{data['prompt_tokens']} tokens of prompt, {data['steps']} steps: {flags.out}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = flag.Parser(description=__doc__)
    flag.model_flags(parser)
    flag.method_flags(parser, default="keyformer")
    parser.add_argument("--task", choices=TASKS, default="summarization")
    parser.add_argument("--dataset_path", type=Path, help="default: the bundled one")
    parser.add_argument(
        "--item", type=flag.whole(0), default=0, help="of the dataset, counted from 0"
    )
    parser.add_argument(
        "--max_new_tokens", type=flag.whole(1, MOST_STEPS), help="default: the task's"
    )
    parser.add_argument("--seed", type=flag.SEED, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=ROOT / "paper" / "results" / "kept_tokens.html")
    flags = parser.parse_args(argv)
    if flags.attention is None:
        flags.attention = "keyformer"
    return flags


def is_page(path: Path) -> bool:
    """Whether a file is a page that this script wrote, but not the template of all."""
    mark = b'<meta name="generator" content="paper/kept_tokens.py">'
    is_file = path.is_file() and not path.samefile(TEMPLATE)
    return is_file and mark in path.read_bytes()[:1000]


@torch.no_grad()
def follow(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    config: KeyformerConfig,
    new_tokens: int,
) -> dict[str, Any]:
    """Generate greedily and note after each step which tokens every head holds.

    Returns
    -------
    dict
        What the page reads: tokens; prompt_tokens and steps, their numbers; layers and heads;
        gone, uint16 in base64, the first step at which a token is no longer held, by layer,
        head and token; scores of the held tokens, bfloat16 in base64, by step, layer, head and
        token, for each of score_steps; and scored, whether the method ranks anything.
    """
    cache = KeyformerCache(model.config, config)
    cache.max_new_tokens = new_tokens
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = inputs["input_ids"]
    prompt_tokens = ids.shape[1]
    ends = torch.as_tensor(model.generation_config.eos_token_id or -1).flatten().tolist()
    held: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    logits = model(**inputs, past_key_values=cache, logits_to_keep=1).logits
    while True:
        of_step = [_by_token(layer, ids.shape[1]) for layer in cache.layers]
        held.append(np.stack([positions for positions, _ in of_step]))
        scores.append(np.stack([values for _, values in of_step]))
        token = logits[:, -1:].argmax(dim=-1)
        if int(token) in ends or len(held) == new_tokens:
            break
        ids = torch.cat([ids, token], dim=1)
        logits = model(input_ids=token, past_key_values=cache).logits

    layers, heads, count = held[-1].shape
    gone = np.zeros((layers, heads, count), dtype=np.uint16)
    for step, of_step_held in enumerate(held):
        gone[..., : of_step_held.shape[-1]][of_step_held] = step + 1
    every = -(-sum(int(h.sum()) for h in held) // MOST_SCORES)
    score_steps = list(range(0, len(held), every))
    kept = np.concatenate([scores[step][held[step]] for step in score_steps])
    halves = (kept.astype("<f4").view("<u4") >> 16).astype("<u2")
    return {
        "tokens": [tokenizer.decode([token]) for token in ids[0].tolist()],
        "prompt_tokens": prompt_tokens,
        "steps": len(held) - 1,
        "layers": layers,
        "heads": heads,
        "gone": base64.b64encode(gone.astype("<u2").tobytes()).decode(),
        "score_steps": score_steps,
        "scores": base64.b64encode(halves.tobytes()).decode(),
        "scored": config.needs_scores,
    }


def _by_token(layer: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``count`` tokens a layer's heads hold, and their scores: (heads, count) each."""
    positions, scores = layer.positions[0].cpu(), layer.scores[0].cpu()
    held = torch.zeros(positions.shape[0], count + 1, dtype=torch.bool)
    values = torch.zeros(held.shape)
    at = positions.where(positions >= 0, count)  # an empty slot's goes to a column of its own
    held.scatter_(1, at, True)
    values.scatter_(1, at, scores)
    return held[:, :count].numpy(), values[:, :count].numpy()


if __name__ == "__main__":
    flag.run_main(main)
