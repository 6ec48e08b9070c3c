"""Continue dialogues under one attention method and score them with ROUGE, or talk with one."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keyformer  # noqa: F401 - before transformers, to keep it quiet

# isort: split
from transformers import TextStreamer, set_seed

from keyformer.config import InputError
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.chat import Chat
from keyformer_evaluation.tasks.data import TASKS, is_text, load_items
from keyformer_evaluation.tasks.run import load, run_and_report, start_token, task_parser

HERE = Path(__file__).parent
CHAT_BUDGET = 256
"""Tokens that the cache of a conversation holds unless --kv_budget says otherwise."""


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags; run over a dataset and print the scores, or talk."""
    parser = task_parser(__doc__, "conversation", HERE, texts="dialogues.txt")
    group = parser.add_argument_group("talking")
    group.add_argument(
        "--interactive",
        action="store_true",
        help="talk with the model, a line a turn, in a cache of --kv_budget tokens (default:"
        f" {CHAT_BUDGET}); --attention is keyformer by default; ends with the input",
    )
    group.add_argument("--narrative", help="the situation (default: the dataset's first)")
    group.add_argument(
        "--speakers",
        nargs=2,
        metavar=("YOU", "MODEL"),
        help="who talks (default: the speakers of the dataset's first item)",
    )
    flags = parser.parse_args(argv)
    if flags.interactive:
        talk(flags)
    elif flags.narrative is not None or flags.speakers is not None:
        raise InputError("--narrative and --speakers need --interactive")
    else:
        run_and_report(flags)


def talk(flags: argparse.Namespace) -> None:
    """A conversation on standard input and output.

    Raises
    ------
    InputError
        If a flag or the model cannot be used, or the model's positions come to an end.
    """
    if flags.attention is None:
        flags.keyformer = True
    if flags.kv_budget is None:
        flags.kv_budget = CHAT_BUDGET
    if flags.prompt is not None:
        raise InputError("--interactive has a form of its own: leave out --prompt")
    if flags.clean_up_tokenization_spaces:
        raise InputError(
            "--interactive prints texts as they come: leave out --clean_up_tokenization_spaces"
        )
    _, config = flag.method_config(flags)
    flag.check_task_flags(flags)
    for name in ("beam", "num_return_sequences"):
        if getattr(flags, name) != 1:
            raise InputError(f"--interactive has one text: --{name} must be 1")
    narrative, speakers = situation(flags)
    model, tokenizer = load(flags)
    set_seed(flags.seed)
    start = start_token(flags, model)
    options = flag.generate_options(flags)
    chat = Chat(model, tokenizer, config, narrative, speakers, start, **options)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # one line must not take others with it
    print(f"{narrative}\n")
    while said := ask(f"{speakers[0]}: "):
        print(f"{speakers[1]}:", end="", flush=True)
        chat.reply(said, Printer(tokenizer))
    seen, size = chat.cache.get_seq_length(), chat.cache.memory_bytes()
    print(f"\n{seen:,} tokens went through a cache of {size / 1024:,.0f} KiB")


def situation(flags: argparse.Namespace) -> tuple[str, tuple[str, str]]:
    """The narrative, and the names of the user and of the model's part."""
    narrative, speakers = flags.narrative, flags.speakers
    if narrative is None or speakers is None:
        item = load_items(flags.dataset_path, TASKS["conversation"])[0]
        narrative = item["narrative"] if narrative is None else narrative
        speakers = item["speakers"][:2] if speakers is None else speakers
    if not is_text("".join([narrative, *speakers])):
        raise InputError("--narrative and --speakers must be UTF-8")
    return narrative, (speakers[0], speakers[1])


def ask(prompt: str) -> str | None:
    """The next line of text that is not empty; None at the end of the input or an interrupt."""
    try:
        while not (said := input(prompt).strip()) or not is_text(said):
            if said:
                print("this line is not UTF-8 and was left out: please say it again")
    except (EOFError, KeyboardInterrupt):
        return None
    return said


class Printer(TextStreamer):
    """Prints a turn as it comes, on one line."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the turn."""
        print(text.rstrip("\n"), end="\n" if stream_end else "", flush=True)


if __name__ == "__main__":
    flag.run_main(main)
