"""Made-up documents, a pure function of (kind, split, index): reports, dialogues, questions.

A report hides a dozen facts of one event among filler about other people, places and figures, and
comes back to most of them; its summary restates all. The narrative of a dialogue states a dozen
facts of a situation, and in the turns two people talk about them. A question is about a short
report, in the shape of COPA, OpenBookQA, Winogrande or PIQA. The wordings stand in news.txt,
dialogues.txt and questions.txt. Train and eval documents share no full name, hence no combination
with one either.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from keyformer_evaluation.records.results import check_replaceable, check_writable, write_text
from keyformer_evaluation.tasks.flags import Parser, run_main
from tiny.templates import (
    Draw,
    Event,
    Question,
    Template,
    fill,
    read_events,
    read_questions,
    sentence,
    slots_of,
)

SPLITS = ("train", "eval")


class Item(NamedTuple):
    """One document, and where its text (report or narrative) states each fact.

    facts: slot -> (value, character of its first statement); last: slot -> character of its last.
    """

    text: str
    facts: dict[str, tuple[str, int]]
    last: dict[str, int]
    document: dict[str, Any]


NEWS = read_events("news.txt")
DIALOGUES = read_events("dialogues.txt")
QUESTIONS = read_questions("questions.txt")


def lay_out(
    event: Event,
    facts: dict[str, str],
    draw: Draw,
    keys: list[tuple[float, Template]],
    echoes: tuple[int, float],
    filler: float,
) -> tuple[str, dict[str, tuple[str, int]], dict[str, int]]:
    """Mix key sentences, echoes and `filler` characters of filler: an Item's first three fields.

    Each key comes with its spot, the share of the text before it. `echoes` is their number and the
    share of the text before the last one; each stands after the keys whose facts it goes back to.
    """
    rng, names = draw.rng, {name for name, _ in event.slot}
    known: dict[str, float] = {}
    for spot, key in keys:
        for name in slots_of(key):
            known.setdefault(name, spot)
    number, end = echoes
    stating = list(keys)
    for (echo,) in rng.sample(event.echo, number):
        after = max(known[name] for name in slots_of(echo) if name in known)
        stating.append((rng.uniform(after, end), echo))
    stating.sort(key=lambda entry: entry[0])
    texts = [sentence(template, facts, draw) for _, template in stating]

    fills: list[str] = []
    size = 0
    for (template,) in rng.sample(event.fill, len(event.fill)):
        if size >= filler:
            break
        fills.append(sentence(template, {}, draw))
        size += len(fills[-1]) + 1

    total = size + sum(len(text) + 1 for text in texts)
    parts: list[str] = []
    first: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    at = 0
    for (spot, template), text in zip(stating, texts, strict=True):
        while fills and at < spot * total:
            parts.append(fills.pop())
            at += len(parts[-1]) + 1
        for name in filter(names.__contains__, slots_of(template)):
            last[name] = at + text.lower().index(facts[name].lower())
            first.setdefault(name, (facts[name], last[name]))
        parts.append(text)
        at += len(text) + 1
    return " ".join(parts + fills), first, last


def news(rng: random.Random, split: str, filler: float) -> Item:
    """A news report; `filler` in (0, 1] scales how much filler stands between its facts."""
    draw = Draw(rng, split)
    event = draw.pick(list(NEWS.values()))
    facts = {name: fill(template, {}, draw) for name, template in event.slot}
    wording = draw.between(0, len(event.key[0]) - 1)
    middle = [draw.pick(group) for group in event.key[1:-2]]
    rng.shuffle(middle)
    templates = [event.key[0][wording], *middle, *(draw.pick(group) for group in event.key[-2:])]
    # Where each key sentence stands: mostly in the first half.
    spots = sorted(rng.uniform(0.05, 0.36) for _ in middle)
    spots = [rng.uniform(0.01, 0.05), *spots, rng.uniform(0.45, 0.7), rng.uniform(0.5, 0.85)]
    keys = list(zip(spots, templates, strict=True))
    laid = lay_out(event, facts, draw, keys, (5, 0.55), filler * rng.uniform(*NEWS_FILLER))
    (summary,) = event.sum[wording % len(event.sum)]
    instruction = "Summarize the following news report."
    output = sentence(summary, facts, draw)
    return Item(*laid, {"instruction": instruction, "input": laid[0], "output": output})


def dialogue(rng: random.Random, split: str, filler: float) -> Item:
    """A dialogue; `filler` in (0, 1] scales how much filler its narrative has."""
    draw = Draw(rng, split)
    event = draw.pick(list(DIALOGUES.values()))
    full = {"a_full": draw.of("person"), "b_full": draw.of("person")}
    a, b = (name.split()[0] for name in full.values())
    facts = {name: fill(template, {}, draw) for name, template in event.slot}
    facts |= {**full, "a": a, "b": b}
    spots = [0.0, *sorted(rng.uniform(0.1, 0.9) for _ in event.key[1:])]
    keys = list(zip(spots, map(draw.pick, event.key), strict=True))
    laid = lay_out(event, facts, draw, keys, (1, 1.0), filler * rng.uniform(*DIALOGUE_FILLER))
    turns = [sentence(turn, facts, draw) for turn in draw.pick(event.talk)]
    speakers = [(a, b)[i % 2] for i in range(len(turns))]
    return Item(*laid, {"narrative": laid[0], "dialogue": turns, "speakers": speakers})


class Shape(NamedTuple):
    """A data set of multiple-choice questions that questions are shaped like.

    kinds: the lines of questions.txt it takes; choices: how many; fields: of a document, from the
    kind, the text before the answer, the choices and the index of the right one; options: from a
    document, each choice as a prompt and a continuation, whose likelihoods are compared; gold: from
    a document, the index of the right one.
    """

    kinds: tuple[str, ...]
    choices: int
    fields: Callable[[str, str, list[str], int], dict[str, Any]]
    options: Callable[[dict[str, Any]], list[tuple[str, str]]]
    gold: Callable[[dict[str, Any]], int]


LINKS = {"cause": " because", "effect": " so"}
SHAPES = {
    "copa": Shape(
        ("cause", "effect"),
        2,
        lambda kind, stem, choices, gold: {
            "premise": stem, "choice1": choices[0], "choice2": choices[1], "question": kind,
            "label": gold,
        },
        lambda item: [
            (item["premise"][:-1] + LINKS[item["question"]], choice)
            for choice in (item["choice1"], item["choice2"])
        ],
        lambda item: item["label"],
    ),
    "openbookqa": Shape(
        ("ask",),
        4,
        lambda kind, stem, choices, gold: {
            "question_stem": stem, "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[gold],
        },
        lambda item: [
            (f"Question: {item['question_stem']}\nAnswer:", choice)
            for choice in item["choices"]["text"]
        ],
        lambda item: "ABCD".index(item["answerKey"]),
    ),
    "winogrande": Shape(
        ("gap",),
        2,
        lambda kind, stem, choices, gold: {
            "sentence": stem, "option1": choices[0], "option2": choices[1], "answer": str(gold + 1),
        },
        lambda item: [
            (before + option, after.strip())
            for before, _, after in [item["sentence"].partition("_")]
            for option in (item["option1"], item["option2"])
        ],
        lambda item: int(item["answer"]) - 1,
    ),
    "piqa": Shape(
        ("end",),
        2,
        lambda kind, stem, choices, gold: {
            "goal": stem, "sol1": choices[0], "sol2": choices[1], "label": gold,
        },
        lambda item: [
            (f"Question: How does this sentence end? {item['goal']}\nAnswer:", solution)
            for solution in (item["sol1"], item["sol2"])
        ],
        lambda item: item["label"],
    ),
}  # fmt: skip


BYSTANDERS = ("person", "org", "place")  # pools whose names filler mentions too


def question(rng: random.Random, split: str, filler: float, shape: str) -> Item:
    """A question about a short report, in the fields of the data set that has its shape."""
    draw, of = Draw(rng, split), SHAPES[shape]
    name = draw.pick(list(NEWS))
    event = NEWS[name]
    pools = {slot: pool for slot, ((kind, pool), *rest) in event.slot if pool in BYSTANDERS}
    event = event._replace(slot=event.slot + [(pool, [("slot", pool)]) for pool in BYSTANDERS])
    facts = {slot: fill(template, {}, draw) for slot, template in event.slot}
    lines = QUESTIONS[name] + [
        line for line in QUESTIONS["common"] if line.answer[0][1] in pools.values()
    ]
    asked = draw.pick([line for line in lines if line.kind in of.kinds])
    needed = {*slots_of(asked.stem), *slots_of(asked.answer)}
    lead, *others = event.key
    for slot in slots_of(asked.answer):
        pool = pools.get(slot, slot)
        if pool in BYSTANDERS:  # the report has another one of its pool to confuse it with
            mentions = [key for key in event.fill if slots_of(key[0]).count(pool) == 1]
            others.insert(draw.between(0, len(others)), draw.pick(mentions))
            rivals = [one for one, of_pool in pools.items() if of_pool == pool]
            needed |= {pool, draw.pick(rivals)}
    beside = [key for key in others if not needed.intersection(slots_of(key[0]))]
    left_out = rng.sample(beside, max(0, len(beside) - 2))
    keys = [draw.pick(key) for key in (lead, *others) if key not in left_out]
    spots = [0.0, *sorted(rng.uniform(0.1, 0.9) for _ in keys[1:])]
    text, first, last = lay_out(
        event, facts, draw, list(zip(spots, keys, strict=True)), (0, 1.0),
        filler * rng.uniform(*QUESTION_FILLER),
    )  # fmt: skip
    gold = draw.between(0, of.choices - 1)
    choices = wrong_choices(event, facts, draw, asked, text, of.choices - 1)
    choices.insert(gold, fill(asked.answer, facts, draw))
    fields = of.fields(asked.kind, sentence(asked.stem, facts, draw), choices, gold)
    return Item(text, first, last, {"context": text, **fields})


def wrong_choices(
    event: Event, facts: dict[str, str], draw: Draw, asked: Question, text: str, count: int
) -> list[str]:
    """The answer with other values in its slots: of the same pool in `text`, else fresh ones.

    Two bystanders could not be told apart, so the rival of one is a fact of the event.
    """
    others = [dict(facts) for _ in range(count)]
    for name, template in event.slot:
        if name not in slots_of(asked.answer):
            continue
        near = [
            value
            for pool, value in draw.drawn
            if template == [("slot", pool)] and value in text and value != facts[name]
            if name not in BYSTANDERS or value in facts.values()
        ]
        draw.rng.shuffle(near)
        taken = {facts[name]}
        for other in others:
            while other[name] in taken:
                other[name] = near.pop() if near else fill(template, {}, draw)
            taken.add(other[name])
    return [fill(asked.answer, other, draw) for other in others]


def options(shape: str, document: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """Each choice of a question as (prompt, continuation), and the index of the right one."""
    of = SHAPES[shape]
    choices = [(f"{document['context']}\n{stem}", end) for stem, end in of.options(document)]
    return choices, of.gold(document)


NEWS_FILLER = (450, 2250)  # characters
DIALOGUE_FILLER = (0, 240)
QUESTION_FILLER = (40, 200)
KINDS: dict[str, Callable[[random.Random, str, float], Item]] = {
    "news": news,
    "dialogue": dialogue,
    **{shape: partial(question, shape=shape) for shape in SHAPES},
}


def item(split: str, index: int, filler: float = 1.0, kind: str = "news") -> Item:
    """The document `index` of a split, with the places of its facts.

    `filler` in (0, 1] shortens its text by leaving out filler. ValueError for an unknown split or
    kind.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    return KINDS[kind](random.Random(f"{kind}/{split}/{index}"), split, filler)


def document(split: str, index: int, filler: float = 1.0, kind: str = "news") -> dict[str, Any]:
    """The document `index` of a split (see `item`) as the datasets hold it.

    News: {"instruction", "input", "output"}; a dialogue: {"narrative", "dialogue": [turn, ...],
    "speakers": [name, ...]}; a question: "context", and the fields of the data set of its shape.
    """
    return item(split, index, filler, kind).document


def main(argv: Sequence[str] | None = None) -> None:
    """Write documents of one kind and split to a file; exit status 2 on bad arguments."""
    parser = Parser(description="Write made-up reports with summaries, dialogues, or questions.")
    parser.add_argument("--kind", choices=list(KINDS), default="news")
    parser.add_argument("--split", choices=SPLITS, default="eval")
    parser.add_argument("--n", type=int, default=200, help="number of documents")
    parser.add_argument("--start", type=int, default=0, help="index of the first document")
    parser.add_argument("--output", type=Path, required=True, help="JSON or JSON lines (.jsonl)")
    args = parser.parse_args(argv)
    if args.n < 1 or args.start < 0:
        parser.error("--n must be at least 1 and --start at least 0")
    documents = [document(args.split, args.start + i, kind=args.kind) for i in range(args.n)]
    if args.output.suffix == ".jsonl":
        text = "".join(json.dumps(made) + "\n" for made in documents)
    else:
        text = json.dumps(documents, indent=2, ensure_ascii=False) + "\n"
    check_writable(args.output)
    check_replaceable(
        args.output, args.output.is_file() and args.output.read_bytes() == text.encode()
    )
    write_text(args.output, text)
    print(f"wrote {args.n} {args.split} documents to {args.output}")


if __name__ == "__main__":
    run_main(main)
