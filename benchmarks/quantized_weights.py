"""ROUGE and memory of models as they are and with quantized weights, under full and Keyformer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keyformer  # noqa: F401 - before transformers, to keep it quiet

# isort: split
from keyformer.config import KeyformerConfig
from keyformer.integration import check_device, load_model
from keyformer.quantize import QUANTIZATIONS, weight_bytes
from keyformer_evaluation.records.results import (
    check_record,
    installed_version,
    run_record,
    write_json,
)
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.data import (
    TASKS,
    Item,
    load_items,
    make_prompt,
    prompt_room,
    sample,
)
from keyformer_evaluation.tasks.generation import generate
from keyformer_evaluation.tasks.run import summary

ROOT = Path(__file__).parents[1]
MODELS = ("mpt-tiny-keyformer", "gptj-tiny-keyformer", "cerebras-tiny-keyformer")
TASK = TASKS["summarization"]
METHODS = ("full", "keyformer")


def main(argv: Sequence[str] | None = None) -> None:
    """Run every model under every kind of weights, print the table, write the record."""
    flags = parse(argv)
    if flags.record:
        check_record(flags.record)
    items = sample(load_items(flags.dataset_path, TASK), flags.n_obs, seed=0)
    device = check_device(flags.device)
    print(f"{'model':26}{'weights':10}{'method':11}{'ROUGE-2':>9}{'ROUGE-L':>9}{'MB':>8}")
    rows = []
    for path in flags.model_path:
        for kind in (None, *flags.quantize):
            for row in measure(flags, path, kind, items):
                rows.append(row)
                print(
                    f"{row['model']:26}{kind or '-':10}{row['method']:11}{row['rouge2']:>9.2f}"
                    f"{row['rougeL']:>9.2f}{row['weight_bytes'] / 1e6:>8.2f}",
                    flush=True,
                )
    if flags.record:
        settings = {"dtype": flags.dtype, "bs": flags.bs, "beam": flags.beam, "items": len(items)}
        record = {**run_record(device), **settings, "rows": rows}
        packages = set(QUANTIZATIONS.values())
        record["versions"] |= {name: installed_version(name) for name in packages}
        write_json(flags.record, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    parser = flag.Parser(description=__doc__)
    bundled = [str(ROOT / "models" / name) for name in MODELS]
    parser.add_argument("--model_path", nargs="+", default=bundled, help="default: the bundled")
    parser.add_argument("--quantize", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS))
    parser.add_argument(
        "--kv_cache", type=flag.PERCENT_ABOVE_0, default=50.0, help="of keyformer, in %% of n"
    )
    parser.add_argument(
        "--dataset_path", default=ROOT / "summarization" / "data" / "sample_eval.json"
    )
    flag.n_obs_flag(parser)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--dtype", default="float32", help="of all that is not quantized")
    parser.add_argument("--bs", type=flag.whole(1), default=8)
    parser.add_argument("--beam", type=flag.WIDTH, default=1)
    parser.add_argument("--max_new_tokens", type=flag.whole(1), default=TASK.max_new_tokens)
    flag.record_flag(parser)
    return parser.parse_args(argv)


def measure(
    flags: argparse.Namespace, path: str, kind: str | None, items: list[Item]
) -> list[dict[str, Any]]:
    """One model with one kind of weights under each method.

    Parameters
    ----------
    kind
        A key of ``QUANTIZATIONS``, or None for the weights as they are.
    """
    model, tokenizer = load_model(path, dtype=flags.dtype, device=flags.device, quantize=kind)
    room = prompt_room(model, flags.max_new_tokens)
    prompts = [make_prompt(item, TASK, tokenizer, room) for item in items]
    rows = []
    for method in METHODS:
        config = KeyformerConfig.preset(method, kv_cache=flags.kv_cache, seed=0)
        generated = generate(
            model,
            tokenizer,
            prompts,
            config,
            batch_size=flags.bs,
            num_beams=flags.beam,
            max_new_tokens=flags.max_new_tokens,
        )
        row: dict[str, Any] = {"model": Path(path).name, "quantize": kind, "method": method}
        row |= {"weight_bytes": weight_bytes(model), "config": config.plain()}
        rows.append({**row, **summary(generated, items, TASK)})
    return rows


if __name__ == "__main__":
    flag.run_main(main)
