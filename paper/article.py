"""The pictures of blog/README.md that explain: why caches grow, key tokens, eviction, noise.

Eviction is that of one head, step by step, with a sentence and a cache of ten tokens; key tokens
are those of an article's beginning. Bytes are counted from the shapes of models, and the softmax
under noise is drawn for logits that are made up, and shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from keyformer import KeyformerCache, KeyformerConfig
from keyformer_evaluation.studies.pictures import Axes, Figure

# isort: split
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from keyformer.config import InputError
from keyformer_evaluation.records.results import (
    check_writable,
    run_record,
    write_json,
    write_picture,
    write_whole,
)
from keyformer_evaluation.speed.shapes import model_config
from keyformer_evaluation.studies.study import ARTICLES, ROOT
from keyformer_evaluation.tasks import flags as flag
from keyformer_evaluation.tasks.data import TASKS, load_items
from keyformer_evaluation.tasks.run import load

SENTENCE = (
    "The old bridge over the river is closed because its steel cables are worn."
    " Drivers who want to cross the river must"
)
SLOTS, RECENT = 10, 40
"""Of the walk: tokens in the cache, and the recent window in % of them."""
WALKED, READ = 5, 145
"""Tokens that are generated in the walk, and read of the article."""

POINTS = 72 / 0.602
"""Of a monospaced letter an inch wide."""

KEY, YOUNG, NEW, GONE = "#0072B2", "#009E73", "#E69F00", "#b0b0b0"
STATES = {"key token": KEY, "recent token": YOUNG, "just read": NEW, "evicted": GONE}


class Walk(NamedTuple):
    """What one head's cache held after the prompt and after each decode step.

    Attributes
    ----------
    tokens
        Of the prompt and what was generated.
    prompt
        How many are the prompt's.
    held, scores
        (steps, slots): which token each slot held, and its score.
    window
        Recent tokens that stay whatever their score.
    """

    tokens: list[str]
    prompt: int
    held: np.ndarray
    scores: np.ndarray
    window: int

    def state(self, token: int, step: int) -> str | None:
        """One of ``STATES`` after a step, the prompt being step 0; None before it is read."""
        read = self.prompt + step
        if token >= read:
            return None
        if token not in self.held[step]:
            return "evicted"
        if step and token == read - 1:
            return "just read"
        return "recent token" if token >= read - self.window else "key token"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw every picture."""
    parser = flag.Parser(description=__doc__)
    flag.model_flags(parser)
    parser.set_defaults(model_name="smollm2-135m")
    parser.add_argument("--layer", type=flag.whole(0), default=24, help="of the walk")
    parser.add_argument("--head", type=flag.whole(0), default=1, help="of keys and values")
    parser.add_argument("--out", type=Path, default=ROOT / "blog" / "figures")
    flags = parser.parse_args(argv)
    check_writable(flags.out, folder=True)
    model, tokenizer = load(flags)
    walked = walk(model, tokenizer, flags.layer, flags.head)
    text = load_items(ARTICLES, TASKS["summarization"])[0]["input"]
    for name, figure in (
        ("growth", growth()),
        ("key_tokens", shaded(*kept_by(model, tokenizer, text))),
        ("walk", walked_through(walked)),
        ("noise", noise()),
    ):
        write_picture(flags.out / f"{name}.png", figure)
    first, *rest = animated(walked)
    times = [3000, *[1200] * (len(rest) - 1), 4000]  # ms
    settings: dict[str, Any] = {"append_images": rest, "duration": times, "loop": 0}
    write_whole(
        flags.out / "walk.gif", lambda file: first.save(file, "GIF", save_all=True, **settings)
    )
    steps = {"tokens": walked.tokens, "prompt": walked.prompt, "held": walked.held.tolist()}
    write_json(flags.out / "walk.json", {**run_record(model.device), "walk": steps})
    print(f"pictures: {flags.out}")


def growth() -> Figure:
    """Bytes of keys and values by the length of a text, beside those of the weights."""
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    ax = figure.subplots()
    lengths = np.arange(0, 65537, 1024)
    for shape, name, color in (
        ("mpt-7b", "MPT-7B", "#D55E00"),
        ("llama-3-8b", "Llama-3-8B", "#0072B2"),
    ):
        config = model_config(shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        weights = 2 * model.num_parameters() / 1e9
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = config.hidden_size // config.num_attention_heads
        of_token = 2 * 2 * config.num_hidden_layers * heads * width
        cache = lengths * of_token / 1e9
        ax.plot(lengths, cache, color=color)
        ax.plot(lengths, cache / 2, color=color, linestyle="--")
        ax.axhline(weights, color=color, linestyle=":", linewidth=1)
        kept = f"{name}, all kept: {of_token / 1e6:.2g} MB a token"
        for text, gb in ((kept, cache[-1]), (f"{name}, half kept", cache[-1] / 2)):
            ax.annotate(text, (lengths[-1], gb), (5, 0), textcoords="offset points", va="center")
        ax.annotate(f"weights of {name}", (0, weights), (2, 2), textcoords="offset points")
    ax.set_xlim(0, lengths[-1])
    ax.set_ylim(0)
    ax.set_xticks(range(0, 65537, 16384))
    ax.set_xlabel("tokens of one text")
    ax.set_ylabel("GB in bfloat16")
    ax.set_title("What a text occupies beside the model's weights", loc="left")
    return figure


@torch.no_grad()
def kept_by(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[str], np.ndarray, KeyformerConfig]:
    """Of the first tokens of a text, the share of layers and heads that keep each of them."""
    config = KeyformerConfig(kv_cache=30, recent=30, seed=0)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :READ].to(model.device)
    cache = KeyformerCache(model.config, config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    positions = torch.stack([layer.positions[0] for layer in cache.layers])
    counts = torch.bincount(positions.flatten().cpu(), minlength=ids.shape[1])
    share = counts.numpy() / (positions.shape[0] * positions.shape[1])
    return [tokenizer.decode([one]) for one in ids[0].tolist()], share, config


def shaded(tokens: list[str], share: np.ndarray, config: KeyformerConfig) -> Figure:
    """A text whose tokens are the darker the more layers and heads keep them."""
    width, lines, column = 92, 0, 0
    places = []
    for token in tokens:
        if column + len(token) > width or "\n" in token:
            lines, column = lines + 1 + token.count("\n") // 2, 0
        places.append((column, lines))
        column += len(token.strip("\n"))
    size = 0.98 * 7.4 * POINTS / width
    figure = Figure(figsize=(7.4, 0.6 + 0.21 * (lines + 1)))
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.86))
    ax.set_axis_off()
    ax.set_xlim(0, width)
    ax.set_ylim(lines + 0.8, -0.6)
    window = len(tokens) - config.recent_window(config.budget(len(tokens)))
    for number, (token, (x, y)) in enumerate(zip(tokens, places, strict=True)):
        color = YOUNG if number >= window else KEY
        length = len(token.strip("\n"))
        alpha = 0.75 * share[number]
        ax.fill_between([x, x + length], y - 0.42, y + 0.42, color=color, alpha=alpha, linewidth=0)
        ax.text(x, y, token.strip("\n"), family="monospace", fontsize=size, va="center")
    ax.set_title(
        f"Darker: kept by more layers and heads, at {config.kv_cache:g} % of the cache."
        " Green: the recent window",
        loc="left",
        fontsize=9,
    )
    return figure


@torch.no_grad()
def walk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int, head: int) -> Walk:
    """Generate a few tokens after :data:`SENTENCE` with a small cache, and look at one head."""
    config = KeyformerConfig(kv_budget=SLOTS, recent=RECENT, seed=0)
    cache = KeyformerCache(model.config, config)
    cache.max_new_tokens = WALKED
    if layer >= len(cache.layers):
        raise InputError(f"--layer must be at most {len(cache.layers) - 1}, got {layer}")
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids.to(model.device)
    tokens, held, scores = ids[0].tolist(), [], []
    fed = ids
    for _ in range(WALKED + 1):
        logits = model(fed, past_key_values=cache, logits_to_keep=1).logits
        of_layer = cache.layers[layer]
        if head >= of_layer.positions.shape[1]:
            raise InputError(
                f"--head must be at most {of_layer.positions.shape[1] - 1}, got {head}"
            )
        held.append(of_layer.positions[0, head].tolist())
        scores.append(of_layer.scores[0, head].tolist())
        fed = logits[:, -1:].argmax(dim=-1)
        tokens.append(int(fed))
    return Walk(
        [tokenizer.decode([token]).strip() or "↵" for token in tokens[:-1]],
        ids.shape[1],
        np.array(held),
        np.array(scores),
        config.recent_window(SLOTS),
    )


def walked_through(walk: Walk) -> Figure:
    """A row for the prompt and each step, a column for each token."""
    steps, count = len(walk.held), len(walk.tokens)
    figure = Figure(figsize=(0.3 * count + 1.4, 0.36 * steps + 1.5), layout="constrained")
    ax = figure.subplots()
    for step in range(steps):
        for token in range(count):
            if (state := walk.state(token, step)) is None:
                continue
            before = walk.state(token, step - 1) if step else "key token"
            leaves = state == "evicted" and before != "evicted"
            color = "white" if state == "evicted" else STATES[state]
            ax.add_patch(_square(token, step, color))
            if leaves:
                ax.plot(token, step, "x", color="black", markersize=6)
    ax.set_xlim(-0.6, count - 0.4)
    ax.set_ylim(steps - 0.4, -0.6)
    ax.set_xticks(range(count), walk.tokens, rotation=60, ha="left", rotation_mode="anchor")
    ax.set_yticks(range(steps), ["after the prompt", *(f"step {step}" for step in range(1, steps))])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    marks = [_square(0, 0, color) for name, color in STATES.items() if name != "evicted"]
    (cross,) = ax.plot([], [], "x", color="black")
    names = [*list(STATES)[:3], "evicted here"]
    figure.legend([*marks, cross], names, loc="outside lower center", ncols=4)
    return figure


def _square(x: float, y: float, color: str, size: float = 0.86) -> Rectangle:
    """A cell's coloured square."""
    edge = "#dddddd" if color == "white" else color
    return Rectangle((x - size / 2, y - size / 2), size, size, facecolor=color, edgecolor=edge)


def animated(walk: Walk) -> list[Image.Image]:
    """The same walk, a frame a step: the text above, the slots and their scores below."""
    frames = []
    for step in range(len(walk.held)):
        figure = Figure(figsize=(7.4, 3.6), dpi=110)
        _draw_frame(figure, walk, step)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    return frames


def _draw_frame(figure: Figure, walk: Walk, step: int) -> None:
    """The text with its evicted tokens in grey, and the slots."""
    ax = figure.add_axes((0.02, 0.46, 0.96, 0.5))
    ax.set_axis_off()
    width, size = 64, 0.96 * 7.4 * POINTS / 65
    x = y = 0
    for token, text in enumerate(walk.tokens):
        if (state := walk.state(token, step)) is None:
            break
        if x + len(text) > width:
            x, y = 0, y + 1
        color = STATES[state]
        ink = GONE if state == "evicted" else "white"
        if state != "evicted":
            ax.fill_between([x - 0.3, x + len(text) + 0.3], y - 0.4, y + 0.4, color=color)
        ax.text(x, y, text, family="monospace", fontsize=size, va="center", color=ink)
        x += len(text) + 1
    ax.set_xlim(-0.5, width + 0.5)
    ax.set_ylim(3.4, -1.4)
    fed = (
        f"Step {step}: “{walk.tokens[walk.prompt + step - 1]}” is read"
        if step
        else "After the prompt"
    )
    ax.text(-0.3, -1.1, fed, fontsize=11)
    _draw_slots(figure.add_axes((0.02, 0.05, 0.96, 0.42)), walk, step)


def _draw_slots(ax: Axes, walk: Walk, step: int) -> None:
    """A box a slot, with its token, under a bar for its score."""
    ax.set_axis_off()
    highest = walk.scores.max()
    for slot, (token, score) in enumerate(zip(walk.held[step], walk.scores[step], strict=True)):
        color = STATES[walk.state(int(token), step) or "evicted"]
        ax.bar(slot, 0.9 * score / highest, bottom=0.55, width=0.5, color=color, alpha=0.6)
        ax.add_patch(_square(slot, 0.0, color, 0.9))
        text = walk.tokens[token]
        ax.text(slot, 0.0, text, color="white", ha="center", va="center", fontsize=8)
    ax.text(-0.45, 1.55, f"The cache: {len(walk.held[step])} slots; bars are scores", fontsize=9)
    ax.set_xlim(-0.6, len(walk.held[step]) - 0.4)
    ax.set_ylim(-0.6, 1.7)


def noise() -> Figure:
    """What noise and temperature make of one softmax."""
    logits = np.array([3.0, 2.2, 1.6, 1.0, 0.6, 0.2, -0.4, -1.0])
    random = np.random.default_rng(0)
    drawn = random.gumbel(size=(512, len(logits)))
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, sharey=True)
    at = np.arange(len(logits))
    left.bar(at, _softmax(logits), color=GONE, label="without noise")
    for number in range(3):
        label = "three draws" if not number else None
        left.plot(at, _softmax(logits + drawn[number]), "o", color=NEW, markersize=5, label=label)
    left.set_title("One query: noise shuffles", loc="left")
    middle.bar(at, _softmax(logits), color=GONE, label="without noise")
    mean = _softmax(logits + drawn).mean(axis=0)
    middle.plot(at, mean, "o-", color=KEY, label=f"mean of {len(drawn)} queries")
    middle.set_title("Many queries: it flattens", loc="left")
    for temperature, color in ((0.5, NEW), (1, GONE), (2, KEY)):
        right.plot(
            at, _softmax(logits / temperature), "o-", color=color, label=f"τ = {temperature:g}"
        )
    right.set_title("Temperature: sharper, flatter", loc="left")
    for ax in (left, middle, right):
        ax.legend(loc="center right")
        ax.set_xticks(at, [f"{one:g}" for one in logits])
        ax.set_xlabel("logit of a token")
    left.set_ylabel("score that a query gives")
    return figure


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


if __name__ == "__main__":
    flag.run_main(main)
