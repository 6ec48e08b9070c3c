"""A task script's run: from its flags to summaries, scores and their record."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keyformer.config import InputError, KeyformerConfig
from keyformer.integration import load_model
from keyformer.quantize import weight_bytes
from keyformer_evaluation.records.identity import environment, own_code, weights_hash
from keyformer_evaluation.records.processes import is_main, own_device
from keyformer_evaluation.records.results import (
    check_record,
    dtype_name,
    peak_memory_bytes,
    record,
    write_record,
)
from keyformer_evaluation.records.store import Result, Store
from keyformer_evaluation.records.work import Job, finishing
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.attentions import check_attentions
from keyformer_evaluation.tasks.data import (
    TASKS,
    Item,
    Task,
    load_items,
    make_prompts,
    prompt_kind,
    prompt_length,
    prompt_room,
    sample,
)
from keyformer_evaluation.tasks.generation import Generated, generate
from keyformer_evaluation.tasks.rouge import mean, rouge


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
    if result["items_from_store"]:
        print(f"  {result['items_from_store']:,} of {result['items']:,} items were done before")
    print(f"texts in {flags.save_path}, scores and record in {flags.score_path}")


def load(flags: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the flags ask for, on this process's own device.

    Raises
    ------
    InputError
        As :func:`keyformer.load_model` does.
    """
    device = own_device(flags.device)
    if flags.model_parallelize and PartialState().num_processes > 1:
        raise InputError("--model_parallelize takes every GPU, so one process has to be launched")
    return load_model(
        flag.model_path(flags),
        dtype=flag.model_dtype(flags),
        device=device,
        device_map="auto" if flags.model_parallelize else None,
        quantize=flags.quantize,
        use_fast_tokenizer=not flags.use_slow_tokenizer,
    )


def generation(
    flags: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: KeyformerConfig,
    seed: int,
    attentions: tuple[Path, bool, bool] | None = None,
    **options: Any,
) -> Job:
    """What generates for prompts, and all that the texts, their time and memory depend on.

    Parameters
    ----------
    flags
        Those of the model, and ``bs``.
    config
        The method; its seed does not matter.
    seed
        Of what is drawn.
    attentions
        A folder for the weights of each batch, and which: see
        :func:`keyformer_evaluation.tasks.generation.generate_batch`.
    options
        Those of that function.
    """
    draws = config.draws_noise or options.get("do_sample", False)
    config = replace(config, seed=seed if config.draws_noise else None)
    at_a_time = 1 if options.get("do_sample") else flags.bs

    def compute(items: Sequence[int]) -> list[Result]:
        more = dict(options)
        if attentions is not None:
            folder, *which = attentions
            more["attentions"] = (folder / f"{items[0]:06d}.npz", *which)
        found = generate(
            model,
            tokenizer,
            [prompts[item] for item in items],
            config,
            batch_size=at_a_time,
            seed=seed,
            **more,
        )
        return [asdict(generated) for generated in found]

    return Job(
        settings={
            "weights": weights_hash(flag.model_path(flags)),
            "dtype": str(model.dtype),
            "quantize": flags.quantize,
            "slow tokenizer": flags.use_slow_tokenizer,
            "padding side": tokenizer.padding_side,
            "config": config.plain(),
            "seed": seed if draws else None,
            "bs": flags.bs,
            **options,
            **environment(model.device, generate.__module__),
            **own_code(config),
        },
        items=prompts,
        compute=compute,
        batch_size=at_a_time,
        costs=None if attentions else [len(prompt) for prompt in prompts],
    )


def run_task(flags: argparse.Namespace) -> dict[str, Any]:
    """Generate for a dataset under one method, score it, write the results.

    Writes ``--save_path`` with one generated text a line, ``--score_path`` with ROUGE and
    the run's record, and attention weights where asked for. Items that ``--store`` has are not
    generated again; if the run is stopped, what is done is written.

    Returns
    -------
    dict
        What was written to ``--score_path``.

    Raises
    ------
    InputError
        If a flag, the dataset, the model or an output path cannot be used.
    KeyboardInterrupt
        If the run was stopped.
    """
    method, config = flag.method_config(flags)
    flag.check_task_flags(flags)
    task = TASKS[flags.task]
    if saves_attentions(flags):
        check_attentions(flags.attentions_path)
    check_record(flags.score_path, flags.save_path, store=flags.store)
    items = sample(load_items(flags.dataset_path, task), flags.n_obs, flags.seed)
    store = Store(flags.store)
    model, tokenizer = load(flags)
    tokenizer.padding_side = flags.padding_side
    kind = prompt_kind(flags.prompt, tokenizer)
    prompts, longest = task_prompts(flags, items, model, tokenizer, config, kind)
    job = task_generation(flags, model, tokenizer, prompts, config, longest)
    resume = flags.resume and not saves_attentions(flags)
    with finishing([job], store, model.device, resume=resume, unit="doc") as (kept, _):
        found = generated(job, store)
        done = [items[item] for item in found]
        result = {
            **summary(
                [*found.values()], done, task, flags.rouge_tokenizer, flags.postprocess_workers
            ),
            "unfinished": len(items) - len(found),
            "items_from_store": kept,
            "rouge_tokenizer": flags.rouge_tokenizer,
            "model": flags.model_name if not flags.model_path else Path(flags.model_path).name,
            "task": flags.task,
            "prompt": kind,
            "method": method,
            "config": config.plain(),
            "dtype": dtype_name(model.dtype),
            "quantize": flags.quantize,
            "weight_bytes": weight_bytes(model),
            **record(store.sources(job.keys)),
            "peak_memory_bytes": peak_memory_bytes(model.device),
        }
        if flags.output_sequence_scores:
            result["sequence_scores"] = [of.sequence_scores for of in found.values()]
        if is_main() and found:
            lines = [" ".join(text.split()) for of in found.values() for text in of.texts]
            texts = "".join(line + "\n" for line in lines)
            write_record(flags.score_path, result, {flags.save_path: texts})
    return result


def saves_attentions(flags: argparse.Namespace) -> bool:
    """Whether the flags ask for attention weights."""
    return flags.save_attentions or flags.save_prompt_attentions


def start_token(flags: argparse.Namespace, model: PreTrainedModel) -> int | None:
    """What prompts begin with, by the flags.

    Raises
    ------
    InputError
        If the model has no such token.
    """
    start, known = flags.decoder_start_token_id, model.get_input_embeddings().num_embeddings
    if start is not None and start >= known:
        raise InputError(
            f"--decoder_start_token_id must be below {known}, the model's tokens, got {start}"
        )
    return start


def task_prompts(
    flags: argparse.Namespace,
    items: Sequence[Item],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: KeyformerConfig,
    kind: str,
) -> tuple[list[str], int | None]:
    """The items' prompts, and the tokens that they were cut to; None with --no_truncation.

    Raises
    ------
    InputError
        If the model's positions have no room for a prompt, or as :func:`start_token` does.
    """
    start = start_token(flags, model)
    room = prompt_room(model, flags.max_new_tokens, config)
    longest = flags.max_tokenizer_length if room is None else min(flags.max_tokenizer_length, room)
    if flags.no_truncation:
        longest = None
    task, workers = TASKS[flags.task], flags.preprocess_workers
    prompts = make_prompts(items, task, tokenizer, longest, kind, start, workers)
    if flags.no_truncation:
        names = [f"item {number}" for number in range(len(items))]
        advice = "leave out --no_truncation, or lower --max_new_tokens"
        check_lengths(prompts, names, tokenizer, room, advice, start)
    return prompts, longest


def task_generation(
    flags: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: KeyformerConfig,
    longest: int | None,
) -> Job:
    """The :func:`generation` that all flags of a task script ask for.

    Parameters
    ----------
    longest
        Tokens that prompts were cut to, which --padding max_length fills up.
    """
    which = flags.save_prompt_attentions, flags.save_attentions
    attentions = (flags.attentions_path, *which) if saves_attentions(flags) else None
    return generation(
        flags,
        model,
        tokenizer,
        prompts,
        config,
        flags.seed,
        attentions=attentions,
        start_token=flags.decoder_start_token_id,
        padding=flags.padding,
        max_prompt_tokens=longest if flags.padding == "max_length" else None,
        max_total_tokens=flags.max_gen_length,
        include_prompt=not flags.output_summaries_only,
        include_special_tokens=flags.include_special_tokens,
        clean_up_spaces=flags.clean_up_tokenization_spaces,
        sequence_scores=flags.output_sequence_scores,
        **flag.generate_options(flags),
    )


def generated(job: Job, store: Store) -> dict[int, Generated]:
    """What the store has of a :func:`generation`, by the number of the item, in their order."""
    found = store.results(job.keys)
    return {item: Generated(**found[key]) for item, key in enumerate(job.keys) if key in found}


def check_lengths(
    prompts: Sequence[str],
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    room: int | None,
    advice: str,
    start: int | None = None,
) -> None:
    """Refuse prompts that the positions cannot hold, before anything is generated.

    Parameters
    ----------
    names
        Whose each prompt is.
    room
        Tokens that a prompt may have; None is any.
    advice
        What to do about it.
    start
        What prompts begin with: see :func:`.data.prompt_tokens`.

    Raises
    ------
    InputError
        Naming the first prompt that has more tokens.
    """
    if room is None:
        return
    for name, prompt in zip(names, prompts, strict=True):
        tokens = prompt_length(tokenizer, prompt, start)
        if tokens > room:
            raise InputError(
                f"the prompt of {name} has {tokens} tokens and the model's positions leave"
                f" room for {room}: {advice}"
            )


def summary(
    found: Sequence[Generated],
    items: Sequence[Item],
    task: Task,
    rouge_tokenizer: str = "default",
    workers: int = 1,
) -> dict[str, Any]:
    """The figures of a run over items, of which there may be none.

    Parameters
    ----------
    rouge_tokenizer, workers
        See :func:`keyformer_evaluation.tasks.rouge.rouge`.

    Returns
    -------
    dict
        items, their number; rouge1, rouge2, rougeL and rougeLsum of each prompt's best text, times
        100; gen_len, characters over all texts, and gen_num, their number, as MLPerf counts them;
        gen_tokens; seconds in ``generate``, over all processes; tokens_per_second of one; and
        kv_bytes_prompt and kv_bytes_end, what the cache occupied after the prompt and at the end,
        beams included, for each prompt.
    """
    if not found:
        return {"items": 0}
    best = [task.scored(item, of.texts[0]) for item, of in zip(items, found, strict=True)]
    references = [task.scored(item, task.reference(item)) for item in items]
    texts = [text for of in found for text in of.texts]
    tokens, seconds = sum(of.tokens for of in found), sum(of.seconds for of in found)
    return {
        "items": len(found),
        **mean(rouge(best, references, rouge_tokenizer, workers)),
        "gen_len": sum(len(text) for text in texts),
        "gen_num": len(texts),
        "gen_tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "kv_bytes_prompt": round(sum(of.kv_bytes_prompt for of in found) / len(found)),
        "kv_bytes_end": round(sum(of.kv_bytes_end for of in found) / len(found)),
    }
