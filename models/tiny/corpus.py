"""Made-up news reports with reference summaries, a pure function of (split, index).

Every report hides a dozen facts of one event among filler about other people, places and figures;
the summary restates those facts. The wordings stand in news.txt; this file holds the pools that
names and figures are drawn from, and the layout. Train and eval documents share no full name of a
person, place, river or organisation (only their parts), hence no combination with one either.
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


class Item(NamedTuple):
    """One document: texts, and where the report states each fact (slot -> value, character)."""

    instruction: str
    report: str
    summary: str
    facts: dict[str, tuple[str, int]]


class Draw:
    """Draws names and figures for one document; no value is drawn twice."""

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng, self.held_out, self.used = rng, split == "eval", set[str]()

    def of(self, kind: str) -> str:
        """A fresh value of the pool `kind`; KeyError for an unknown pool."""
        make = POOLS[kind]
        for _ in range(30):  # a small pool may run out
            value = make(self)
            if value not in self.used:
                break
        self.used.add(value)
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
}

# A template is a list of literals, slot names and choices; a choice is a list of templates.
Template = list[tuple[str, Any]]


class Event(NamedTuple):
    """The templates of one kind of event (see news.txt)."""

    slots: list[tuple[str, Template]]
    keys: list[list[Template]]
    fills: list[Template]
    sums: list[Template]


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
    text = re.sub(r"(?<=\. )[a-z]", lambda m: m[0].upper(), fill(template, facts, draw))
    return text[0].upper() + text[1:]


def read_events(path: Path) -> dict[str, Event]:
    """Parse news.txt; ValueError names a line that is none of its forms."""
    events: dict[str, Event] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        word, _, text = line.partition(": ")
        if line.startswith("== "):
            event = events[line[3:]] = Event([], [], [], [])
        elif word.startswith("slot "):
            event.slots.append((word[5:], parse(text)))
        elif word == "key":
            event.keys.append([parse(text)])
        elif word == "or":
            event.keys[-1].append(parse(text))
        elif word == "fill":
            event.fills.append(parse(text))
        elif word == "sum":
            event.sums.append(parse(text))
        elif line and not line.startswith("#"):
            raise ValueError(f"{path}:{number}: cannot read {line!r}")
    return events


EVENTS = read_events(Path(__file__).with_name("news.txt"))
COMMON = EVENTS.pop("common").fills
EVENT_LIST = list(EVENTS.values())


def news(rng: random.Random, split: str, filler: float) -> Item:
    """A news report; `filler` in (0, 1] scales how much filler stands between its facts."""
    draw = Draw(rng, split)
    event = draw.pick(EVENT_LIST)
    facts: dict[str, str] = {}
    for name, template in event.slots:
        facts[name] = fill(template, {}, draw)

    wording = draw.between(0, len(event.keys[0]) - 1)
    keys = [event.keys[0][wording], *(draw.pick(group) for group in event.keys[1:])]
    middle = keys[1:-2]
    rng.shuffle(middle)
    keys = [keys[0], *middle, *keys[-2:]]
    key_texts = [sentence(key, facts, draw) for key in keys]

    # Where each key sentence stands, as a share of the report: mostly in its first half.
    spots = sorted(rng.uniform(0.06, 0.44) for _ in middle)
    spots = [rng.uniform(0.01, 0.08), *spots, rng.uniform(0.45, 0.7), rng.uniform(0.5, 0.85)]

    goal = filler * rng.uniform(*FILLER_CHARS)
    fill_texts: list[str] = []
    templates = event.fills + COMMON
    rng.shuffle(templates)
    size = 0
    while size < goal and templates:
        fill_texts.append(sentence(templates.pop(), facts, draw))
        size += len(fill_texts[-1]) + 1

    total = size + sum(len(text) + 1 for text in key_texts)
    report: list[str] = []
    stated: dict[str, tuple[str, int]] = {}
    at = 0
    fill_texts.reverse()
    for key, text, spot in zip(keys, key_texts, spots, strict=True):
        while fill_texts and at < spot * total:
            report.append(fill_texts.pop())
            at += len(report[-1]) + 1
        for kind, name in key:
            if kind == "slot":
                stated[name] = (facts[name], at + text.lower().index(facts[name].lower()))
        report.append(text)
        at += len(text) + 1
    report += reversed(fill_texts)
    summary = sentence(event.sums[wording % len(event.sums)], facts, draw)
    instruction = "Summarize the following news report."
    return Item(instruction, " ".join(report), summary, stated)


FILLER_CHARS = (520, 2650)  # characters of filler in a report
KINDS: dict[str, Callable[[random.Random, str, float], Item]] = {"news": news}


def item(split: str, index: int, filler: float = 1.0, kind: str = "news") -> Item:
    """The document `index` of a split, with the places of its facts.

    `filler` in (0, 1] shortens the report by leaving out filler. ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return KINDS[kind](random.Random(f"{kind}/{split}/{index}"), split, filler)


def document(split: str, index: int, filler: float = 1.0) -> dict[str, str]:
    """The document `index` of a split as {"instruction", "input", "output"} (see `item`)."""
    made = item(split, index, filler)
    return {"instruction": made.instruction, "input": made.report, "output": made.summary}


def main(argv: Sequence[str] | None = None) -> None:
    """Write documents of one split to a JSON file; exit status 2 on bad arguments."""
    parser = Parser(description="Write made-up news reports with summaries.")
    parser.add_argument("--split", choices=SPLITS, default="eval")
    parser.add_argument("--n", type=int, default=200, help="number of documents")
    parser.add_argument("--start", type=int, default=0, help="index of the first document")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    if args.n < 1 or args.start < 0:
        parser.error("--n must be at least 1 and --start at least 0")
    documents = [document(args.split, args.start + i) for i in range(args.n)]
    check_writable(args.output)
    write_json(args.output, documents)
    print(f"wrote {args.n} {args.split} documents to {args.output}")


if __name__ == "__main__":
    run_main(main)
