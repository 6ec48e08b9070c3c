"""Few-shot evaluation: lm-eval's tasks and the bundled ones under one method."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from keyformer.config import InputError
from keyformer.integration import PACKAGES, check_device
from keyformer.quantize import weight_bytes
from keyformer_evaluation.records.processes import processes
from keyformer_evaluation.records.results import (
    check_record,
    dtype_name,
    peak_memory_bytes,
    record,
    write_json,
)
from keyformer_evaluation.records.store import Store
from keyformer_evaluation.records.work import told
from keyformer_evaluation.tasks import flags as flag

try:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from keyformer_lm_eval.harness import evaluate, find_tasks
    from keyformer_lm_eval.model import KeyformerLM
except ModuleNotFoundError as error:
    flag.stop_without(error, extra="lm_eval")

OUT = Path(__file__).parent / "out"
TYPES = {package.removesuffix("_keyformer"): name for name, package in PACKAGES.items()}
"""model_type of config.json by the names of the patched models."""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print lm-eval's table, write its results and the run's record."""
    flags = parse(argv)
    method, config = flag.method_config(flags)
    settings = {**asdict(config), "seed": flags.seed}
    check_record(flags.out / "record.json", store=flags.store)
    manager = find_tasks(flags.tasks)
    with closing(Store(flags.store)) as store:
        lm = load(flags, method, settings)
        lm.store, lm.resume = store, flags.resume
        tracker = EvaluationTracker(output_path=str(flags.out))
        try:
            results = run(flags, lm, manager, method, settings, tracker)
        except KeyboardInterrupt as stop:
            raise told(stop, "finished requests", store) from stop
        # Of all processes: each has asked its share.
        came = record(store.sources(gather_object(lm.keys)))
        kept = sum(gather_object([lm.kept]))
    if not results:
        return
    samples = results.pop("samples")
    written = {
        "model": flags.model_name,
        "method": method,
        "config": settings,
        "dtype": dtype_name(lm.model.dtype),
        "quantize": flags.quantize,
        "weight_bytes": weight_bytes(lm.model),
        **{name: getattr(flags, name) for name in ("tasks", "num_fewshot", "limit", "bs", "seed")},
        **came,
        "processes": lm.world_size,
        "requests_from_store": kept,
        "lm_eval": version("lm_eval"),
        "peak_memory_bytes": peak_memory_bytes(lm.device),
        "results": results["results"],
    }
    print(make_table(results))
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, of_task in samples.items():
        tracker.save_results_samples(task_name=task, samples=of_task)
    write_json(flags.out / "record.json", written)
    print(f"results, samples and record in {flags.out}")


def run(
    flags: argparse.Namespace,
    lm: KeyformerLM,
    manager: TaskManager,
    method: str,
    settings: dict[str, Any],
    tracker: EvaluationTracker,
) -> dict[str, Any]:
    """lm-eval's results; none in processes that are not the first."""
    return evaluate(
        lm,
        flags.tasks,
        manager,
        flags.num_fewshot,
        limit=flags.limit,
        model_args={
            "pretrained": flags.model_name,
            "method": method,
            "quantize": flags.quantize,
            **settings,
        },
        batch_size=flags.bs,
        device=str(lm.device),
        evaluation_tracker=tracker,
        fewshot_random_seed=flags.seed,
    )


def load(flags: argparse.Namespace, method: str, settings: dict[str, Any]) -> KeyformerLM:
    """The model that the flags ask for.

    Raises
    ------
    InputError
        If it cannot be loaded, or is not of --model_type.
    """
    lm = KeyformerLM(
        flag.model_path(flags),
        method,
        dtype=flag.model_dtype(flags),
        device=device(flags),
        quantize=flags.quantize,
        use_fast_tokenizer=not flags.use_slow_tokenizer,
        parallelize=flags.model_parallelize,
        batch_size=flags.bs,
        max_length=flags.max_length,
        **settings,
    )
    found = lm.model.config.model_type
    if flags.model_type and found != TYPES.get(flags.model_type, flags.model_type):
        raise InputError(
            f"--model_type {flags.model_type} contradicts the checkpoint, which is a {found}"
        )
    return lm


def device(flags: argparse.Namespace) -> str | None:
    """Where the flags put the model; None leaves it to the model.

    Raises
    ------
    InputError
        If there is no such device, or each of several processes has another one.
    """
    if flags.device is None:
        return None
    state = processes()
    if state.num_processes > 1 and flags.device != state.device.type:
        raise InputError(
            f"--device {flags.device} contradicts the launcher, which gives each process a"
            f" {state.device.type}"
        )
    return str(check_device(flags.device))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    parser = flag.Parser(description=__doc__)
    flag.model_flags(parser)
    parser.add_argument(
        "--model_type",
        help="model_type that the checkpoint's config.json has to have, or the name of a patched"
        f" model: {', '.join(TYPES)} (default: whatever it is)",
    )
    flag.method_flags(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--tasks", nargs="+", default=["tiny"], help="of lm-eval or bundled (default: %(default)s)"
    )
    group.add_argument(
        "--num_fewshot", type=flag.whole(0, 1000), default=0, help="examples in each prompt"
    )
    group.add_argument("--limit", type=flag.whole(1), help="documents of each task (default: all)")
    group.add_argument(
        "--bs", type=flag.whole(1), default=16, help="batch size (default: %(default)s)"
    )
    group.add_argument(
        "--max_length",
        type=flag.whole(2),
        help="longest prompt and continuation (default: lm-eval's hf's)",
    )
    group.add_argument(
        "--seed", type=flag.SEED, default=0, help="of examples and noise (default: 0)"
    )
    group.add_argument("--out", type=Path, default=OUT, help="folder of what is written")
    flag.store_flags(group, OUT / "finished.sqlite")
    flags = parser.parse_args(argv)
    flag.check_model_flags(flags)
    return flags


if __name__ == "__main__":
    flag.run_main(main)
