"""Templates of made-up texts: the files that hold them, and the pools that fill their slots.

Names are made of two parts, and a hash of the pair says which split may use it, so that train and
eval documents share no full name of a person, place, river or organisation.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


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


class Draw:
    """Draws names and figures for one document; no two of them begin with the same word.

    drawn: each value so far, with its pool.
    """

    def __init__(self, rng: random.Random, split: str) -> None:
        self.rng, self.held_out, self.used = rng, split == "eval", set[str]()
        self.drawn: list[tuple[str, str]] = []

    def of(self, kind: str) -> str:
        """A fresh value of the pool `kind`; KeyError for an unknown pool."""
        make = POOLS[kind]
        for _ in range(30):  # a small pool may run out
            value = make(self)
            if value.split()[0] not in self.used:
                break
        self.used.add(value.split()[0])
        self.drawn.append((kind, value))
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


class Question(NamedTuple):
    """A line of questions.txt: its kind, the text before the answer, and the answer."""

    kind: str
    stem: Template
    answer: Template


def read_questions(name: str) -> dict[str, list[Question]]:
    """Parse questions.txt; ValueError names a line that is none of its forms."""
    path = Path(__file__).with_name(name)
    questions: dict[str, list[Question]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        word, _, text = line.partition(": ")
        stem, _, answer = text.partition(" | ")
        if line.startswith("== "):
            of_event = questions[line[3:]] = []
        elif word.startswith("gap ") and "_" in stem:
            of_event.append(Question("gap", parse(stem), [("slot", word[4:])]))
        elif word in ("cause", "effect", "end", "ask") and answer:
            of_event.append(Question(word, parse(stem), parse(answer)))
        elif line and not line.startswith("#"):
            raise ValueError(f"{path}:{number}: cannot read {line!r}")
    return questions
