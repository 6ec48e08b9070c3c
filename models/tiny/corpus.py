"""Made-up documents, a pure function of (kind, split, index): news reports and dialogues.

A report hides a dozen facts of one event among filler about other people, places and figures, and
comes back to most of them; its summary restates all. The narrative of a dialogue states a dozen
facts of a situation, and in the turns two people talk about them. The wordings stand in news.txt
and dialogues.txt; this file holds the pools that names and figures are drawn from, and the layout.
Train and eval documents share no full name of a person, place, river or organisation (only their
parts), hence no combination with one either.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keyformer.evaluation.flags import Parser, run_main
from keyformer.evaluation.results import check_writable, write_json

SPLITS = ("train", "eval")


def words(text: str) -> list[str]:
    """The words of a pool."""
    return text.split()


FIRST = words(
    "Ada Adrian Agnes Albert Alice Alma Amir Anders Andrea Anika Anton Arno Astrid August Aurel "
    "Bella Bernard Bianca Boris Brigid Bruno Camille Carl Carmen Cecil Celia Cesar Clara Conrad "
    "Cora Cyril Dagmar Damian Daria Delia Denis Diana Dora Duncan Edgar Edith Edwin Elena Elias "
    "Elsa Emil Emma Enzo Erik Esther Eva Fabian Felix Fiona Flora Frank Frieda Gabriel Gemma "
    "Georg Gerda Gilbert Gloria Grace Greta Gustav Hanna Harald Hector Heidi Helena Henrik Hilda "
    "Horace Hugo Ida Igor Ilse Ines Ingrid Irene Isaac Ivan Ivy Jacob Jana Jasper Joan Jonas "
    "Josef Judith Julia Karim Karin Kaspar Kira Klaus Lara Laura Leah Leo Lena Leila Linus Livia "
    "Lorenz Louis Lucas Lucy Lydia Mabel Magda Malik Marco Maria Martha Martin Matilda Maurice "
    "Mila Mina Miriam Moritz Nadia Naomi Nestor Nicola Nils Nina Noah Nora Odette Olaf Olga Omar "
    "Oscar Otto Pablo Paula Perry Petra Philip Pia Quentin Rafael Ralph Ramona Rebecca Regina "
    "Rita Robert Roland Rosa Ruben Rufus Ruth Samir Samuel Sara Selma Sergei Sigrid Silas Simon "
    "Sofia Stefan Stella Sven Sybil Tamara Tariq Thea Theo Tilda Tobias Toni Ulla Ursula Valerie "
    "Vera Victor Viola Walter Wanda Wilma Xaver Yara Yusuf Zelda Zoe"
)
LAST_A = words(
    "Abel Acker Bern Birk Brand Bren Cald Cart Dal Dorn Eber Elm Fal Fenn Gar Grim Hag Hart Holm "
    "Jans Kel Kess Lind Lor Mar Mer Nor Oster Pell Quar Rad Ross Sand Sel Stein Tal Tor Ul Van "
    "Wal Wein Zim"
)
LAST_B = words(
    "berg by den er feld gren hof ing ius ley low man quist sen ski son stad ter ton well"
)
LAST = [a + b for a in LAST_A for b in LAST_B]
PLACE_A = words(
    "Alder Amber Ash Barrow Birch Black Bram Brine Clay Cold Corn Crane Dun East Elder Fair Fern "
    "Fox Frost Gold Gran Green Hazel Heather High Iron Kings Lake Lark Lime Long Maple Marl Mill "
    "Moss North Oak Otter Pine Queens Raven Red Reed Rook Rose Salt Silver South Spring Stone "
    "Swan Thorn Timber West White Wind Winter Wolf Wood Yarrow"
)
PLACE_B = words(
    "bank beck bourne bridge brook burgh bury combe cross dale dean fell field ford gate grove "
    "ham haven hill holt hurst land leigh march mere minster moor mouth pool port ridge shaw "
    "stead stoke thorpe wick worth"
)
RIVER_A = words("Ar Bel Cor Dev Er Fal Gla Har Is Lo Mor Ner Or Pel Ru Sar Tam Ul Ver Yl")
RIVER_B = words("ane ber da enna ive lin mar na ola que ra sel tis une vel wen")
ORG_A = words(
    "Apex Arrow Atlas Aurora Beacon Bluebell Bright Cobalt Comet Compass Coral Crown Delta Eagle "
    "Ember Falcon Galaxy Garnet Granite Harvest Helix Horizon Ivory Jasmine Juniper Keystone "
    "Lantern Lotus Magnet Meridian Mosaic Nimbus Nova Onyx Orbit Orchid Pelican Phoenix Pioneer "
    "Polar Prime Quartz Radius Saffron Summit Talon Titan Topaz Triton Union Vector Velvet Vertex "
    "Zenith Zephyr"
)
ORG_B = words(
    "Brothers Chemicals Dairies Dynamics Energy Estates Foods Foundry Freight Glass Group Holdings "
    "Industries Instruments Labs Logistics Lumber Marine Materials Metals Mills Motors Optics "
    "Partners Pharma Plastics Rail Shipping Steel Systems Textiles Trading Works"
)
MONTHS = words(
    "January February March April May June July August September October November December"
)


WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


class Item(NamedTuple):
    """One document, and where its text (report or narrative) states each fact.

    facts: slot -> (value, character of its first statement); last: slot -> character of its last.
    """

    text: str
    facts: dict[str, tuple[str, int]]
    last: dict[str, int]
    document: dict[str, Any]


class Draw:
    """Draws names and figures for one document; no two of them begin with the same word."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng, self.held_out, self.used = rng, split == "eval", set[str]()

    def of(self, kind: str) -> str:
        """A fresh value of the pool `kind`; KeyError for an unknown pool."""
        make = POOLS[kind]
        for _ in range(30):  # a small pool may run out
            value = make(self)
            if value.split()[0] not in self.used:
                break
        self.used.add(value.split()[0])
        return value

    def pair(self, a: list[str], b: list[str], glue: str = "") -> str:
        """One of a plus one of b; a hash of the pair says which split may use it (1 in 5: eval)."""
        while True:
            value = self.pick(a) + glue + self.pick(b)
            if (zlib.crc32(value.encode()) % 5 == 0) == self.held_out:
                return value

    def pick(self, options: list[Any]) -> Any:
        return options[int(self.rng.random() * len(options))]

    def between(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))


POOLS: dict[str, Callable[[Draw], str]] = {
    "person": lambda d: d.pair(FIRST, LAST, " "),
    "place": lambda d: d.pair(PLACE_A, PLACE_B),
    "river": lambda d: d.pair(RIVER_A, RIVER_B),
    "org": lambda d: d.pair(ORG_A, ORG_B, " "),
    "date": lambda d: f"{d.between(1, 28)} {d.pick(MONTHS)}",
    "year": lambda d: str(d.between(1810, 1989)),
    "teens": lambda d: str(d.between(11, 29)),
    "tens": lambda d: str(d.between(12, 98)),
    "hundreds": lambda d: str(d.between(110, 989)),
    "thousands": lambda d: f"{d.between(1010, 9989):,}",
    "decimal": lambda d: f"{d.between(12, 98) / 10}",
    "low_rise": lambda d: f"{d.between(10, 59) / 10}",
    "high_rise": lambda d: f"{d.between(60, 129) / 10}",
    "percent": lambda d: f"{d.between(201, 899) / 10}",
    "money": lambda d: f"{d.between(11, 989) / 10} million crowns",
    "billion": lambda d: f"{d.between(11, 989) / 10} billion crowns",
    "morning": lambda d: f"{d.between(6, 10)}:{5 * d.between(1, 11):02}",
    "midday": lambda d: f"{d.between(11, 15)}:{5 * d.between(1, 11):02}",
    "evening": lambda d: f"{d.between(16, 20)}:{5 * d.between(1, 11):02}",
    "night": lambda d: f"{d.between(21, 23)}:{5 * d.between(1, 11):02}",
    "weekday": lambda d: d.pick(WEEKDAYS),
}

# A template is a list of literals, slot names and choices; a choice is a list of templates.
Template = list[tuple[str, Any]]


class Event(NamedTuple):
    """The templates of one kind of event or situation, as news.txt and dialogues.txt name them."""

    slot: list[tuple[str, Template]]
    key: list[list[Template]]
    echo: list[list[Template]]
    fill: list[list[Template]]
    sum: list[list[Template]]
    talk: list[list[Template]]


def parse(text: str) -> Template:
    """Compile "a {slot} [x|y]" into a template."""
    parts: Template = []
    for slot, choice, literal in re.findall(r"\{(\w+)\}|\[([^\]]*)\]|([^{\[]+)", text):
        if slot:
            parts.append(("slot", slot))
        elif choice:
            parts.append(("choice", [parse(option) for option in choice.split("|")]))
        else:
            parts.append(("text", literal))
    return parts


def fill(template: Template, facts: dict[str, str], draw: Draw) -> str:
    """The text of a template: slots from `facts`, else fresh draws."""
    text = ""
    for kind, value in template:
        if kind == "text":
            text += value
        elif kind == "slot":
            text += facts[value] if value in facts else draw.of(value)
        else:
            text += fill(draw.pick(value), facts, draw)
    return text


def sentence(template: Template, facts: dict[str, str], draw: Draw) -> str:
    """The text of a template with capitals where sentences begin."""
    text = re.sub(r"(?<=[.?!] )[a-z]", lambda m: m[0].upper(), fill(template, facts, draw))
    return text[0].upper() + text[1:]


def slots_of(template: Template) -> list[str]:
    """The slots of a template that stand outside choices."""
    return [value for kind, value in template if kind == "slot"]


def read_events(name: str) -> dict[str, Event]:
    """Parse news.txt or dialogues.txt; ValueError names a line that is none of their forms."""
    path = Path(__file__).with_name(name)
    events: dict[str, Event] = {}
    group: list[Template] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        word, _, text = line.partition(": ")
        if line.startswith("== "):
            event = events[line[3:]] = Event([], [], [], [], [], [])
        elif word.startswith("slot "):
            event.slot.append((word[5:], parse(text)))
        elif word in Event._fields:
            group = [parse(text)]
            getattr(event, word).append(group)
        elif word in ("or", "turn"):
            group.append(parse(text))
        elif line and not line.startswith("#"):
            raise ValueError(f"{path}:{number}: cannot read {line!r}")
    common = events.pop("common").fill
    for event in events.values():
        event.fill.extend(common)
    return events


NEWS = read_events("news.txt")
DIALOGUES = read_events("dialogues.txt")


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


NEWS_FILLER = (450, 2250)  # characters
DIALOGUE_FILLER = (0, 240)
KINDS: dict[str, Callable[[random.Random, str, float], Item]] = {
    "news": news,
    "dialogue": dialogue,
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
    "speakers": [name, ...]}.
    """
    return item(split, index, filler, kind).document


def main(argv: Sequence[str] | None = None) -> None:
    """Write documents of one kind and split to a JSON file; exit status 2 on bad arguments."""
    parser = Parser(description="Write made-up news reports with summaries, or dialogues.")
    parser.add_argument("--kind", choices=list(KINDS), default="news")
    parser.add_argument("--split", choices=SPLITS, default="eval")
    parser.add_argument("--n", type=int, default=200, help="number of documents")
    parser.add_argument("--start", type=int, default=0, help="index of the first document")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.n < 1 or args.start < 0:
        parser.error("--n must be at least 1 and --start at least 0")
    documents = [document(args.split, args.start + i, kind=args.kind) for i in range(args.n)]
    check_writable(args.output)
    write_json(args.output, documents)
    print(f"wrote {args.n} {args.split} documents to {args.output}")


if __name__ == "__main__":
    run_main(main)
