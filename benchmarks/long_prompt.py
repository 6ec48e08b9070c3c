"""Prompts of growing length through a cache of fixed size: time, and memory that stays flat."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

import keyformer  # noqa: F401 - before transformers, to keep it quiet

# isort: split
from transformers import PreTrainedModel

from keyformer.cache import KeyformerCache
from keyformer.config import KeyformerConfig
from keyformer_evaluation.records.results import (
    check_record,
    dtype_name,
    peak_memory_bytes,
    run_record,
    write_json,
)
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.run import load


def main(argv: Sequence[str] | None = None) -> None:
    """Run each length, print a line for it, write the record."""
    flags = parse(argv)
    if flags.record:
        check_record(flags.record)
    method, config = flag.method_config(flags)
    model, _ = load(flags)
    print(f"{'tokens':>9}{'seconds':>10}{'KV KiB':>9}{'peak MiB':>10}")
    rows = []
    for tokens in sorted(flags.tokens):
        row = measure(model, config, tokens, flags.max_new_tokens)
        rows.append(row)
        print(
            f"{tokens:>9}{row['seconds']:>10.1f}{row['kv_bytes'] / 1024:>9.0f}"
            f"{row['peak_memory_bytes'] / 2**20:>10.1f}"
        )
    if flags.record:
        described = {"model": flags.model_name, "method": method, "config": config.plain()}
        described["dtype"] = dtype_name(model.dtype)
        write_json(flags.record, {**described, **run_record(model.device), "rows": rows})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked; by default Keyformer with 256 slots, in chunks of 256 tokens.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    parser = flag.Parser(description=__doc__)
    flag.model_flags(parser)
    flag.method_flags(parser)
    parser.set_defaults(keyformer=True, kv_budget=256, prefill_chunk=256)
    parser.add_argument(
        "--tokens", nargs="+", type=flag.whole(1, 10**8), default=[2_000, 20_000, 200_000]
    )
    parser.add_argument("--max_new_tokens", type=flag.whole(1), default=16)
    flag.record_flag(parser)
    return parser.parse_args(argv)


def measure(
    model: PreTrainedModel, config: KeyformerConfig, tokens: int, max_new_tokens: int
) -> dict[str, Any]:
    """One random prompt of ``tokens`` and what is generated after it.

    Returns
    -------
    dict
        tokens; seconds, generation included; kv_bytes, of the cache at the end; and
        peak_memory_bytes, on a CPU of the process since its start, so that lengths have to be
        measured in ascending order.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    prompt = prompt.to(model.device)
    cache = KeyformerCache(model.config, config)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    began = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - began, 2),
        "kv_bytes": cache.memory_bytes(),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }


if __name__ == "__main__":
    flag.run_main(main)
