"""The flags of the task scripts, and what they say about each other."""

from __future__ import annotations

import argparse
import io
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from keyformer.budgets import POLICIES
from keyformer.config import CACHE_DTYPES, METHODS, POSITIONS, InputError, KeyformerConfig
from keyformer.integration import check_device
from keyformer.quantize import QUANTIZATIONS
from keyformer.rules import RULES
from keyformer_evaluation.records.processes import is_main, leave
from keyformer_evaluation.tasks.data import PROMPTS, TASKS
from keyformer_evaluation.tasks.rouge import TOKENIZERS

MODELS = Path(__file__).parents[2]
"""The folder models/, where the bundled checkpoints are."""

BUNDLED_MODEL = "mpt-tiny-keyformer"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with exit code 2.

    A number out of its flag's bounds, see :func:`whole` and :func:`real`, is an InputError.
    """

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except _OutOfBounds as error:
            raise InputError(f"{action.option_strings[0]} {error}") from error


class _OutOfBounds(Exception):
    """What a flag's value must be; argparse lets it pass, as it is no ValueError."""


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A flag's ``type``: whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also where there are thousands of digits
            raise _OutOfBounds(f"must be a whole number, got {text[:40]!r}") from None
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise _OutOfBounds(f"must be {bound}, got {text[:40]}")
        return value

    return parse


def real(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """A flag's ``type``: numbers in [least, most], or (least, most] with ``above``."""
    allowed = f"{'(' if above else '['}{least:g}, {most:g}]"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _OutOfBounds(f"must be a number, got {text[:40]!r}") from None
        if not least <= value <= most or (above and value == least):  # nan is refused, too
            raise _OutOfBounds(f"must be in {allowed}, got {text[:40]}")
        return value

    return parse


SEED = whole(0, 2**32 - 1)
"""A seed that Python, numpy and torch all take."""
PERCENT = real(0, 100)
PERCENT_ABOVE_0 = real(0, 100, above=True)
FACTOR = real(1e-4, 1e4)
"""Of logits: they stay finite, and of any use, within."""
WIDTH = whole(1, 256)
"""Sequences that a prompt is multiplied by."""
WORKERS = whole(1, 256)
"""Threads or processes."""


def run_main(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a script's main and end the process.

    Input that cannot be used is one line and exit code 2; Ctrl-C and SIGTERM are one line too, and
    130 and 143. Of several processes the first alone prints results and warns.
    """
    name = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, _terminate)
    if not is_main():
        logging.disable(logging.WARNING)
    try:
        with nullcontext() if is_main() else redirect_stdout(io.StringIO()):
            main(None)
        code = 0
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as stop:
        if is_main():
            print(f"\n{name}: stopped{f': {stop}' if str(stop) else ''}", file=sys.stderr)
        code = 143 if isinstance(stop, Terminated) else 130
    leave()
    sys.exit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does."""


def _terminate(number: int, frame: Any) -> NoReturn:
    raise Terminated


def store_flags(parser: argparse._ActionsContainer, store: Path | None) -> None:
    """Flags of what is remembered of one run for the next.

    Parameters
    ----------
    store
        Default of --store; None is a file beside what is written.
    """
    parser.add_argument(
        "--store",
        type=Path,
        default=store,
        help="finished items, so that a stopped run goes on where it was (default:"
        f" {store or 'measured.sqlite in --out'})",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-resume computes every item anew",
    )


def stop_without(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """End a script that imports a package of one of this repository's extras, with exit code 2."""
    print(
        f"{Path(sys.argv[0]).name}: error: {error.name} is not installed:"
        f' pip install -c constraints.txt -e ".[{extra}]"',
        file=sys.stderr,
    )
    sys.exit(2)


def method_flags(parser: argparse.ArgumentParser, default: str = "full") -> None:
    """Flags that choose the attention method and its settings.

    Parameters
    ----------
    default
        What ``--help`` says of the method where the flags name none.
    """
    defaults = KeyformerConfig()
    group = parser.add_argument_group("method")
    group.add_argument(
        "--attention", choices=METHODS, help=f"attention method (default: {default})"
    )
    group.add_argument("--keyformer", action="store_true", help="short for --attention keyformer")
    group.add_argument(
        "--kv_cache",
        type=PERCENT_ABOVE_0,
        default=defaults.kv_cache,
        help="cache size in %% of the prompt, in (0, 100]; full ignores it (default: %(default)s)",
    )
    group.add_argument(
        "--recent",
        type=PERCENT,
        default=defaults.recent,
        help="recent window in %% of the cache, in [0, 100]; windows, streaming_llm, key"
        " and recall have their own (default: %(default)s)",
    )
    group.add_argument(
        "--kv_budget", type=whole(1), help="cache size in tokens, instead of --kv_cache"
    )
    group.add_argument(
        "--positions",
        choices=POSITIONS,
        default=defaults.positions,
        help="of cached tokens: original, in the text, or new, in the cache (default: %(default)s)",
    )
    group.add_argument(
        "--cache_dtype",
        choices=CACHE_DTYPES,
        default=defaults.cache_dtype,
        help="what slots hold keys and values in: auto, the model's dtype, or fewer bits"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--rule",
        default=defaults.rule,
        help=f"what ranks tokens: {', '.join(RULES)}; or several, each with its share of the key"
        " tokens: '0.9*accumulated + 0.1*last(pooling=5)'; recall has its own (default:"
        " %(default)s)",
    )
    group.add_argument(
        "--budgets",
        choices=POLICIES,
        default=defaults.budgets,
        help="how layers and heads share the cache: alike, fewer from layer to layer, or by the"
        " scores of a layer's heads (default: %(default)s)",
    )
    chunk_flag(group)
    for name, when in (("tau_init", "at the prompt"), ("tau_end", "at the last token")):
        group.add_argument(
            f"--{name}",
            type=FACTOR,
            default=getattr(defaults, name),
            help=f"temperature of keyformer's score {when} (default: %(default)s)",
        )


def chunk_flag(parser: argparse._ActionsContainer) -> None:
    """The flag for prompts in chunks."""
    parser.add_argument(
        "--prefill_chunk",
        type=whole(1),
        help="tokens of a prompt that are processed, and evicted to the cache's size, at a time:"
        " memory is bounded whatever the prompt's length (default: all at once)",
    )


def prompt_flag(parser: argparse._ActionsContainer) -> None:
    """The flag for what items are turned into."""
    parser.add_argument(
        "--prompt",
        choices=PROMPTS,
        help="alpaca, the paper's template; chat, the tokenizer's own; none, the document without"
        " an instruction (default: chat if the tokenizer has a template, else alpaca)",
    )


def method_config(flags: argparse.Namespace) -> tuple[str, KeyformerConfig]:
    """The method's name and configuration that the flags ask for.

    Raises
    ------
    InputError
        If they contradict each other or a value is out of range.
    """
    if flags.keyformer and flags.attention not in (None, "keyformer"):
        raise InputError(f"--keyformer contradicts --attention {flags.attention}")
    method = "keyformer" if flags.keyformer else flags.attention or "full"
    names = (
        *("kv_cache", "recent", "kv_budget", "prefill_chunk", "tau_init", "tau_end"),
        *("positions", "cache_dtype", "rule", "budgets"),
    )
    settings = {name: getattr(flags, name) for name in names}
    # Out of range is an error under every method, also where the method fixes the value.
    KeyformerConfig(**settings)
    return method, KeyformerConfig.preset(method, **settings)


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that choose a model and where it runs."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_name",
        default=BUNDLED_MODEL,
        help="name of the model in the results; without --model_path also what is loaded: a"
        " folder of models/ or a name on the hub (default: %(default)s)",
    )
    group.add_argument("--model_path", help="checkpoint folder or name on the hub")
    group.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        help="float32, bfloat16, float16, or auto: the checkpoint's own on a GPU, float32 on a"
        " CPU (default: %(default)s)",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="quantize the weights as they are loaded; needs bitsandbytes (bnb-) or torchao (int8)",
    )
    group.add_argument(
        "--model_parallelize",
        action="store_true",
        help="spread the layers over all GPUs with accelerate",
    )
    group.add_argument(
        "--causal_lm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the model is a decoder-only one; the only kind there is here",
    )
    group.add_argument(
        "--use_slow_tokenizer",
        action="store_true",
        help="the tokenizer's Python implementation, where it has one",
    )


def check_model_flags(flags: argparse.Namespace) -> None:
    """Refuse what no model here can be.

    Raises
    ------
    InputError
        If flags of the model contradict each other or ask for an encoder-decoder model.
    """
    if not flags.causal_lm:
        raise InputError("--no-causal_lm: encoder-decoder models are not supported")
    if flags.model_parallelize and flags.device not in (None, "cuda"):
        raise InputError(
            f"--device {flags.device} contradicts --model_parallelize, which takes every GPU"
        )


def model_dtype(flags: argparse.Namespace) -> str:
    """The dtype to load with: auto is float32 on a CPU.

    Raises
    ------
    InputError
        If there is no such device.
    """
    if flags.dtype != "auto" or flags.model_parallelize:
        return flags.dtype
    return "float32" if check_device(flags.device).type == "cpu" else "auto"


def model_path(flags: argparse.Namespace) -> str:
    """What the flags say to load."""
    if flags.model_path:
        return flags.model_path
    folder = MODELS / flags.model_name
    return str(folder) if folder.is_dir() else flags.model_name


def task_flags(
    parser: argparse.ArgumentParser, task: str, dataset_path: Path, out: Path, save_path: Path
) -> None:
    """Flags of a task script: data, output and generation.

    Parameters
    ----------
    task
        Default of --task.
    dataset_path
        Default of --dataset_path.
    out
        Default folder of what is written.
    save_path
        Default of --save_path.
    """
    _data_flags(parser, task, dataset_path)
    _output_flags(parser, out, save_path)
    _generation_flags(parser, TASKS[task].max_new_tokens)


def _data_flags(parser: argparse.ArgumentParser, task: str, dataset_path: Path) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--task", choices=TASKS, default=task, help="how items become prompts")
    prompt_flag(group)
    group.add_argument("--dataset_path", default=dataset_path, help="JSON list or JSON lines")
    n_obs_flag(group)
    group.add_argument("--seed", type=SEED, default=0, help="of every draw (default: 0)")
    group.add_argument(
        "--max_tokenizer_length",
        type=whole(1, 2**20),
        default=2048,
        help="longest prompt in tokens; the document is cut to fit this and, less"
        " --max_new_tokens, the model's table of positions (default: %(default)s)",
    )
    group.add_argument("--no_truncation", action="store_true", help="prompts are never cut")
    group.add_argument(
        "--decoder_start_token_id",
        type=whole(0),
        help="token that every prompt begins with; put before those that do not (default: none)",
    )
    group.add_argument(
        "--preprocess_workers",
        type=WORKERS,
        default=1,
        help="threads that cut and tokenize the prompts before the model runs",
    )
    group.add_argument(
        "--return_tensors", default="pt", help="of the tokenizer; pt, PyTorch's, is all there is"
    )
    group.add_argument("--padding", choices=("longest", "max_length"), default="longest")
    group.add_argument("--padding_side", choices=("left", "right"), default="left")


def _output_flags(parser: argparse.ArgumentParser, out: Path, save_path: Path) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=Path, default=save_path)
    group.add_argument("--score_path", type=Path, default=out / "scores.json")
    group.add_argument("--attentions_path", type=Path, default=out / "attentions")
    group.add_argument(
        "--save_attentions",
        action="store_true",
        help="weights of each generated token; no item is then taken from --store",
    )
    group.add_argument(
        "--save_prompt_attentions",
        action="store_true",
        help="weights of the prompt: memory quadratic in its length",
    )
    group.add_argument(
        "--output_summaries_only",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave the prompt out of --save_path",
    )
    group.add_argument(
        "--output_sequence_scores",
        action="store_true",
        help="add each sequence's log-probability per token to --score_path",
    )
    group.add_argument("--include_special_tokens", action="store_true")
    group.add_argument(
        "--clean_up_tokenization_spaces",
        action="store_true",
        help="drop spaces before punctuation and contractions from what is decoded",
    )
    group.add_argument(
        "--postprocess_workers", type=WORKERS, default=1, help="processes that compute ROUGE"
    )
    rouge_flag(group)
    store_flags(group, out / "finished.sqlite")


def _generation_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--bs",
        type=whole(1),
        default=1,
        help="batch size; with --do_sample prompts go one by one",
    )
    group.add_argument("--beam", type=WIDTH, default=1, help="beams; the paper's runs use 4")
    group.add_argument("--early_stopping", action="store_true", help="of beam search")
    group.add_argument("--do_sample", action="store_true")
    group.add_argument("--temperature", type=FACTOR, help="of sampling")
    group.add_argument("--top_k", type=whole(1), help="of sampling")
    group.add_argument("--top_p", type=real(0, 1, above=True), help="of sampling")
    group.add_argument("--num_return_sequences", type=WIDTH, default=1)
    group.add_argument("--no_repeat_ngram_size", type=whole(0), default=0)
    group.add_argument("--repetition_penalty", type=FACTOR, default=1.0)
    group.add_argument(
        "--max_new_tokens",
        type=whole(1),
        default=max_new_tokens,
        help="generated at most (default: %(default)s)",
    )
    group.add_argument(
        "--max_gen_length", type=whole(1), help="prompt and generated together at most"
    )
    group.add_argument("--min_gen_length", type=whole(0), default=0, help="generated at least")
    group.add_argument("--eos_token_id", type=whole(0), help="ends a text (default: the model's)")


def n_obs_flag(parser: argparse._ActionsContainer) -> None:
    """The flag for how many items of a dataset."""
    parser.add_argument("--n_obs", type=whole(1), help="items, drawn at random (default: all)")


def record_flag(parser: argparse._ActionsContainer) -> None:
    """The flag for a record of rows."""
    parser.add_argument("--record", type=Path, help="write the rows and their record as JSON")


def rouge_flag(parser: argparse._ActionsContainer) -> None:
    """The flag for what ROUGE takes for words."""
    parser.add_argument(
        "--rouge_tokenizer",
        choices=TOKENIZERS,
        default="default",
        help="default: rouge-score's, as in the paper, reads a to z and digits only; unicode: all"
        " scripts, the same on English (default: %(default)s)",
    )


def check_task_flags(flags: argparse.Namespace) -> None:
    """Refuse combinations that cannot work, before anything is loaded.

    Raises
    ------
    InputError
        Naming the flags.
    """
    check_model_flags(flags)
    if not flags.do_sample:
        for name in ("temperature", "top_k", "top_p"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name} needs --do_sample")
    if flags.num_return_sequences > flags.beam and (flags.beam > 1 or not flags.do_sample):
        raise InputError(
            f"--num_return_sequences {flags.num_return_sequences} needs as many --beam, or"
            f" --do_sample and one; --beam is {flags.beam}"
        )
    if flags.min_gen_length > flags.max_new_tokens:
        raise InputError(
            f"--min_gen_length {flags.min_gen_length} is more than"
            f" --max_new_tokens {flags.max_new_tokens}"
        )
    if flags.prefill_chunk is not None and (flags.save_attentions or flags.save_prompt_attentions):
        raise InputError("--prefill_chunk contradicts --save_attentions: a step is then many calls")
    if flags.return_tensors != "pt":
        raise InputError(
            f"--return_tensors must be pt, as generation here runs on PyTorch, got"
            f" {flags.return_tensors}"
        )
    if flags.padding == "max_length" and flags.no_truncation:
        raise InputError("--padding max_length contradicts --no_truncation")


def generate_options(flags: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``generate`` that the flags ask for."""
    options: dict[str, Any] = {
        "max_new_tokens": flags.max_new_tokens,
        "num_beams": flags.beam,
        "do_sample": flags.do_sample,
        "num_return_sequences": flags.num_return_sequences,
    }
    if flags.min_gen_length:
        options["min_new_tokens"] = flags.min_gen_length
    if flags.beam > 1:
        options["early_stopping"] = flags.early_stopping
    if flags.no_repeat_ngram_size:
        options["no_repeat_ngram_size"] = flags.no_repeat_ngram_size
    if flags.repetition_penalty != 1.0:
        options["repetition_penalty"] = flags.repetition_penalty
    for name in ("temperature", "top_k", "top_p", "eos_token_id"):
        if getattr(flags, name) is not None:
            options[name] = getattr(flags, name)
    return options
