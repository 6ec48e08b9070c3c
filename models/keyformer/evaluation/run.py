"""A task script's run: from its flags to summaries, scores and their record."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from keyformer.config import InputError, KeyformerConfig
from keyformer.evaluation import flags as flag
from keyformer.evaluation.attentions import check_attentions
from keyformer.evaluation.data import TASKS, Item, Task, load_items, make_prompt, sample
from keyformer.evaluation.generation import Generated, generate
from keyformer.evaluation.results import (
    check_record,
    peak_memory_bytes,
    run_record,
    write_record,
)
from keyformer.evaluation.rouge import mean, rouge
from keyformer.integration import load_model
from keyformer.quantize import weight_bytes


def task_parser(description: str | None, task: str, here: Path, texts: str) -> flag.Parser:
    """All flags of a task script.

    Parameters
    ----------
    description
        What ``--help`` says of the script.
    task
        Key of ``TASKS``, the default of --task.
    here
        The script's folder, with data/ in it and out/ to be made.
    texts
        Name of the file that generated texts go to.
    """
    parser = flag.Parser(description=description)
    flag.model_flags(parser)
    flag.method_flags(parser)
    out = here / "out"
    flag.task_flags(parser, task, here / "data" / "sample_eval.json", out, out / texts)
    return parser


def run_and_report(flags: argparse.Namespace) -> None:
    """Run a task and print its scores.

    Raises
    ------
    InputError
        As :func:`run_task` does.
    """
    result = run_task(flags)
    print(f"{result['model']}, {result['method']}:")
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "tokens_per_second", "kv_bytes_end"):
        print(f"  {name:18} {result[name]:,}")
    print(f"texts in {flags.save_path}, scores and record in {flags.score_path}")


def load(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the flags ask for.

    Raises
    ------
    InputError
        As :func:`keyformer.load_model` does.
    """
    return load_model(
        flag.model_path(flags),
        dtype=flag.model_dtype(flags),
        device=flags.device,
        device_map="auto" if flags.model_parallelize else None,
        quantize=flags.quantize,
        use_fast_tokenizer=not flags.use_slow_tokenizer,
    )


def run_task(flags: argparse.Namespace) -> dict[str, Any]:
    """Generate for a dataset under one method, score it, write the results.

    Writes ``--save_path`` with one generated text a line, ``--score_path`` with ROUGE and
    the run's record, and attention weights where asked for.

    Returns
    -------
    dict
        What was written to ``--score_path``.

    Raises
    ------
    InputError
        If a flag, the dataset, the model or an output path cannot be used.
    """
    method, config = flag.method_config(flags)
    flag.check_task_flags(flags)
    task = TASKS[flags.task]
    saves_attentions = flags.save_attentions or flags.save_prompt_attentions
    if saves_attentions:
        check_attentions(flags.attentions_path)
    check_record(flags.score_path, flags.save_path)
    items = sample(load_items(flags.dataset_path, task), flags.n_obs, flags.seed)
    model, tokenizer = load(flags)
    tokenizer.padding_side = flags.padding_side

    room = prompt_room(model, flags.max_new_tokens, config)
    longest = flags.max_tokenizer_length if room is None else min(flags.max_tokenizer_length, room)
    if flags.no_truncation:
        check_lengths(items, task, tokenizer, room)
        longest = None
    set_seed(flags.seed)
    generated = generate(
        model,
        tokenizer,
        [make_prompt(item, task, tokenizer, longest) for item in items],
        config,
        batch_size=flags.bs,
        padding=flags.padding,
        max_prompt_tokens=longest,
        max_total_tokens=flags.max_gen_length,
        include_prompt=not flags.output_summaries_only,
        include_special_tokens=flags.include_special_tokens,
        sequence_scores=flags.output_sequence_scores,
        attentions=(
            (flags.attentions_path, flags.save_prompt_attentions, flags.save_attentions)
            if saves_attentions
            else None
        ),
        **flag.generate_options(flags),
    )
    result = {
        **summary(generated, items, task, flags.rouge_tokenizer),
        "rouge_tokenizer": flags.rouge_tokenizer,
        "model": flags.model_name if not flags.model_path else Path(flags.model_path).name,
        "task": flags.task,
        "method": method,
        "config": asdict(config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantize": flags.quantize,
        "weight_bytes": weight_bytes(model),
        **run_record(model.device),
        "peak_memory_bytes": peak_memory_bytes(model.device),
    }
    if generated.sequence_scores is not None:
        result["sequence_scores"] = generated.sequence_scores
    lines = [" ".join(text.split()) for texts in generated.texts for text in texts]
    texts = "".join(line + "\n" for line in lines)
    write_record(flags.score_path, result, {flags.save_path: texts})
    return result


def prompt_room(
    model: PreTrainedModel, max_new_tokens: int, config: KeyformerConfig | None = None
) -> int | None:
    """The longest prompt in tokens, so that what is generated has positions too; None is any.

    Parameters
    ----------
    config
        The method: with new positions and prompts in chunks, only the cache has to fit.

    Raises
    ------
    InputError
        If the model's table of positions has no room for a prompt.
    """
    table = model.get_decoder().position_table
    chunks_move = config and config.positions == "new" and config.prefill_chunk
    if table is None or chunks_move:
        return None
    room = table - max_new_tokens + 1  # the last generated token is not fed back
    if room < 1:
        raise InputError(
            f"max_new_tokens must be at most the model's {table} positions, got {max_new_tokens}"
        )
    return room


def check_lengths(
    items: Sequence[Item], task: Task, tokenizer: PreTrainedTokenizerBase, room: int | None
) -> None:
    """Refuse prompts that a table of positions cannot hold, before anything is generated.

    Raises
    ------
    InputError
        Naming the first item whose prompt has more than ``room`` tokens.
    """
    if room is None:
        return
    for index, item in enumerate(items):
        tokens = len(tokenizer(task.prompt(item), verbose=False)["input_ids"])
        if tokens > room:
            raise InputError(
                f"the prompt of item {index} has {tokens} tokens and the model's positions leave"
                f" room for {room}: leave out --no_truncation, or lower --max_new_tokens"
            )


def summary(
    generated: Generated, items: Sequence[Item], task: Task, rouge_tokenizer: str = "default"
) -> dict[str, Any]:
    """The figures of a run.

    Parameters
    ----------
    rouge_tokenizer
        See :func:`keyformer.evaluation.rouge.rouge`.

    Returns
    -------
    dict
        rouge1, rouge2, rougeL and rougeLsum of each prompt's best text, times 100; gen_len,
        characters over all texts, and gen_num, their number, as MLPerf counts them;
        gen_tokens; seconds; tokens_per_second; and kv_bytes_prompt and kv_bytes_end, what
        the cache occupied after the prompt and at the end, beams included, for each prompt.
    """
    best = [task.scored(item, of[0]) for item, of in zip(items, generated.texts, strict=True)]
    references = [task.scored(item, task.reference(item)) for item in items]
    texts = [text for several in generated.texts for text in several]
    return {
        **mean(rouge(best, references, rouge_tokenizer)),
        "gen_len": sum(len(text) for text in texts),
        "gen_num": len(texts),
        "gen_tokens": generated.tokens,
        "seconds": round(generated.seconds, 3),
        "tokens_per_second": round(generated.tokens / generated.seconds, 2),
        "kv_bytes_prompt": round(sum(generated.kv_bytes_prompt) / len(references)),
        "kv_bytes_end": round(sum(generated.kv_bytes_end) / len(references)),
    }
