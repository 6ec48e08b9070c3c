"""What ranks tokens and how slots are shared out, of one layer of one sequence, on plain lists.

Written from the definitions alone, on top of oracle.py: every query walks over every token it
can see, and survivors are picked one at a time. All key/value heads of a layer are here, as some
rules and budgets look at them together. Nothing here looks at keyformer.

A rule is a function of what a forward told it and of the scores before; see ``Scorer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from oracle import Head, Token, softmax


@dataclass(eq=False)
class Candidate(Token):
    """A token that is held, or new, with a score for each rule."""

    scores: list[float] = field(default_factory=list)


Scores = dict[Candidate, float]


@dataclass
class Told:
    """What rules are told of a forward, of one key/value head."""

    tokens: list[Candidate]
    """Slots and new, the oldest first."""
    keys: dict[Candidate, list[float]]
    """As attention read them."""
    received: list[dict[Candidate, list[float]]]
    """For each new query, the oldest first: weight * f of its heads, by the tokens it sees."""
    forgetting: float


Scorer = Callable[[list[Told], list[Scores]], list[Scores]]
"""From all heads of a layer and the scores of before, the scores of now."""


@dataclass
class Rule:
    """What ranks tokens, and what part of the key slots it fills."""

    scorer: Scorer
    share: float = 1.0
    rounding: float = 0.0
    """By how much equal scores may differ where they are computed in float32."""


@dataclass
class Layer:
    """All key/value heads of a layer.

    Parameters
    ----------
    heads
        Settings and tokens of each head.
    rules
        In order; their shares add up to 1.
    budgets
        Slots of each head; None: k of all of them.
    least
        With "adaptive" budgets, the part of the key slots that every head gets.
    """

    heads: list[Head]
    rules: list[Rule]
    budgets: list[int] | None = None
    least: float | None = None
    read: bool = False
    """Whether a forward has been evicted."""

    def __post_init__(self) -> None:
        self.budgets = self.budgets or [head.k for head in self.heads]

    def attend(self, columns: list[tuple[list, list, list]], tau: float) -> list[list]:
        """Attend with new tokens and score all; the outputs of each head, by query head.

        ``columns`` has queries, keys and values of each key/value head, as oracle.Head takes them.
        """
        if not columns[0][1]:
            return [[[] for _ in queries] for queries, _, _ in columns]
        outputs, told = [], []
        for head, new in zip(self.heads, columns, strict=True):
            output, now = attend(head, *new, tau, len(self.rules))
            outputs.append(output)
            told.append(now)
        if self.heads[0].scored:
            scores = []
            for r, rule in enumerate(self.rules):
                before = [
                    {t: t.scores[r] * now.forgetting ** len(now.received) for t in now.tokens}
                    for now in told
                ]
                scores.append(rule.scorer(told, before))
            for h, now in enumerate(told):
                for t in now.tokens:
                    t.scores = [of_rule[h][t] for of_rule in scores]
        return outputs

    def evict(
        self,
        held: list[set[int]] | None = None,
        budgets: list[int] | None = None,
        prompt_goes_on: bool = False,
    ) -> None:
        """Keep what each head's budget has room for.

        ``held`` and ``budgets`` are what another implementation chose: where tokens are equal up
        to rounding, its choice is taken. Without them the older stays, and the lower head's.
        """
        ranks = [
            [
                {t: t.scores[r] / (head.seen - t.position) ** head.age_power for t in head.tokens}
                for r in range(len(self.rules))
            ]
            for head in self.heads
        ]
        if not self.read and self.least is not None and self.heads[0].seen > self.heads[0].k:
            self.adapt([of_head[0] for of_head in ranks], budgets)
        self.read = True
        for h, head in enumerate(self.heads):
            safe, rest = parted(head)
            turns = self.turns(self.budgets[h], head, len(safe), len(rest))
            picked = None
            if held is not None:
                picked = self.pick(turns, rest, ranks[h], held[h])
            if picked is None:
                picked = self.pick(turns, rest, ranks[h], None)
            head.tokens = sorted(safe + picked, key=lambda t: t.position)
            if head.keys_end is None and not prompt_goes_on:
                head.keys_end = head.seen - head.w * (head.dilation + 1)

    def turns(self, budget: int, head: Head, safe: int, rest: int) -> list[int]:
        """Which rule picks the next token, until the slots are full."""
        free = max(0, min(budget - safe, rest))
        turns: list[int] = []
        for r, rule in enumerate(self.rules[:-1]):
            turns += [r] * math.floor(rule.share * (budget - head.w - head.sinks) + 1e-9)
        turns = turns[:free]
        return turns + [len(self.rules) - 1] * (free - len(turns))

    def pick(
        self,
        turns: list[int],
        rest: list[Candidate],
        ranks: list[Scores],
        held: set[int] | None,
    ) -> list[Candidate] | None:
        """The best of ``rest`` by the rule whose turn it is, one at a time.

        With ``held`` only tokens there are taken, each of which has to be the best of its turn or
        equal to it up to rounding; None if they cannot have been picked so.
        """
        dead_ends = set()

        def go_on(turn: int, left: list[Candidate]) -> list[Candidate] | None:
            if turn == len(turns):
                return []
            state = frozenset(left)
            if state in dead_ends:
                return None
            rank = ranks[turns[turn]]
            best = max(left, key=lambda t: rank[t])  # the older of two equals
            choices = [best]
            if held is not None:
                rounding = self.rules[turns[turn]].rounding
                choices = [
                    t for t in left if t.position in held and near(rank[t], rank[best], rounding)
                ]
            for choice in choices:
                more = go_on(turn + 1, [t for t in left if t is not choice])
                if more is not None:
                    return [choice, *more]
            dead_ends.add(state)
            return None

        return go_on(0, rest)

    def adapt(self, ranks: list[Scores], budgets: list[int] | None) -> None:
        """Give the layer's key slots to the heads whose tokens score best."""
        settings = self.heads[0]
        slots = settings.k - settings.w - settings.sinks
        taken = [math.floor(self.least * slots)] * len(self.heads)
        others: list[tuple[int, int, float]] = []
        for h, head in enumerate(self.heads):
            ranked = sorted(parted(head)[1], key=lambda t: -ranks[h][t])
            others += [(t.position, h, ranks[h][t]) for t in ranked[taken[h] :]]
        others.sort()  # the older first, of the lower head first
        safe = settings.w + settings.sinks
        while sum(taken) < len(self.heads) * slots:
            best = max(others, key=lambda other: other[2])
            if budgets is not None:
                equal = [o for o in others if near(o[2], best[2], self.rules[0].rounding)]
                wanted = [o for o in equal if taken[o[1]] + safe < budgets[o[1]]]
                best = wanted[0] if wanted else best
            others.remove(best)
            taken[best[1]] += 1
        self.budgets = [safe + of_head for of_head in taken]


def attend(head: Head, queries, keys, values, tau: float, rules: int) -> tuple[list, Told]:
    """Outputs of each query head for new tokens, and what the rules are told."""
    outputs = [[] for _ in queries]
    damping = 1.0 if head.keys_end is None else head.damping
    for key, value in zip(keys, values, strict=True):
        head.tokens.append(Candidate(head.seen, key, value, scores=[0.0] * rules))
        head.seen += 1
    first_new = len(head.tokens) - len(keys)
    read = {t: head.turned(t.key, head.place(t)) for t in head.tokens}
    received = []
    for i in range(len(keys)):
        visible = head.tokens[: first_new + i + 1]
        place = head.place(visible[-1])
        weight = damping * head.forgetting ** (len(keys) - 1 - i)
        gives: dict[Candidate, list[float]] = {t: [] for t in visible}
        for g, group in enumerate(queries):
            query = head.turned(group[i], place)
            x = [
                head.scale * dot(query, read[t]) + head.slope_of(g) * (head.place(t) - place)
                for t in visible
            ]
            attention = softmax(x)
            outputs[g].append(
                [
                    sum(p * t.value[c] for p, t in zip(attention, visible, strict=True))
                    for c in range(len(values[i]))
                ]
            )
            here = visible[-1].position
            y = [a + head.noise_of(g)(here, t.position) for a, t in zip(x, visible, strict=True)]
            for t, f in zip(visible, softmax([b / tau for b in y]), strict=True):
                gives[t].append(weight * f)
        received.append(gives)
    return outputs, Told(list(head.tokens), read, received, head.forgetting)


def parted(head: Head) -> tuple[list[Candidate], list[Candidate]]:
    """The tokens that stay whatever their scores, and those that compete."""
    step = head.dilation + 1
    window = range(head.seen - head.w * step, head.seen)
    safe, rest = [], []
    for t in head.tokens:
        recent = t.position in window and t.position % step == 0
        frozen = head.frozen and head.keys_end is not None and t.position < head.keys_end
        (safe if recent or frozen or t.position < head.sinks else rest).append(t)
    return safe, rest


def near(score: float, best: float, rounding: float) -> bool:
    """Whether two scores are equal up to what float32 rounds."""
    return best - score <= rounding + 3e-5 * abs(best)


def total(told: Told, t: Candidate, last: int | None = None) -> float:
    """What a token received from the last new queries, or from all of them."""
    queries = told.received if last is None else told.received[-last:]
    return sum(sum(gives[t]) for gives in queries if t in gives)


def accumulated(heads: list[Told], before: list[Scores]) -> list[Scores]:
    """Algorithm 1: all that a token has received."""
    return [
        {t: was[t] + total(told, t) for t in told.tokens}
        for told, was in zip(heads, before, strict=True)
    ]


def observed(
    heads: list[Told], before: list[Scores], queries: int = 64, pooling: int = 5
) -> list[Scores]:
    """What the last queries gave a token and its neighbours."""
    scores = []
    for told, was in zip(heads, before, strict=True):
        new = len(told.received)
        decay = (1 - 1 / queries) ** new if new < queries else 0.0
        received = {t.position: total(told, t, queries) for t in told.tokens}
        scores.append(
            {t: was[t] * decay + pooled(received, t.position, pooling) for t in told.tokens}
        )
    return scores


def last(heads: list[Told], before: list[Scores], pooling: int = 1) -> list[Scores]:
    """What the last query gave a token in all heads together."""
    received: dict[int, float] = {}
    for told in heads:
        for t in told.tokens:
            received[t.position] = received.get(t.position, 0.0) + total(told, t, 1)
    return [{t: pooled(received, t.position, pooling) for t in told.tokens} for told in heads]


def peak(
    heads: list[Told], before: list[Scores], queries: int = 32, pooling: int = 5
) -> list[Scores]:
    """The most that one of the last queries gave a token in any head, and its neighbours."""
    new = len(heads[0].received)
    decay = (1 - 1 / queries) ** new if new < queries else 0.0
    received: dict[int, float] = {}
    for told in heads:
        for gives in told.received[-queries:]:
            for t, by_head in gives.items():
                received[t.position] = max([received.get(t.position, 0.0), *by_head])
    return [
        {t: max(was[t] * decay, pooled(received, t.position, pooling)) for t in told.tokens}
        for told, was in zip(heads, before, strict=True)
    ]


def recall(
    heads: list[Told],
    before: list[Scores],
    queries: int = 16,
    pooling: int = 17,
    strength: float = 1 / 32,
    power: float = 3,
) -> list[Scores]:
    """All that a token has received; and, after more than a token, what the last queries gave it
    and its neighbours at once, to a power, in parts of what a head has given in all. Neither the
    first token nor the last ones count as neighbours that were looked at."""
    scores = accumulated(heads, before)
    for told, now in zip(heads, scores, strict=True):
        new, seen = len(told.received), told.tokens[-1].position + 1
        if new == 1:
            continue
        given = sum(total(told, t) for t in told.tokens) / new * seen
        most: dict[int, float] = {}
        for gives in told.received[-queries:]:
            for t, by_head in gives.items():
                if 0 < t.position < seen - queries:
                    most[t.position] = max(most.get(t.position, 0.0), *by_head)
        looks = {position: f**power for position, f in most.items()}
        for t in now:
            now[t] += strength * given * pooled(looks, t.position, pooling)
    return scores


def pooled(received: dict[int, float], position: int, pooling: int) -> float:
    """The average around a position, where what is not there received 0."""
    half = (pooling - 1) // 2
    around = range(position - half, position + half + 1)
    return sum(received.get(neighbour, 0.0) for neighbour in around) / pooling


def largest(heads: list[Told], before: list[Scores]) -> list[Scores]:
    """The most that a token has received at once."""
    return [
        {t: max([was[t], *(f for gives in told.received for f in gives.get(t, []))]) for t in was}
        for told, was in zip(heads, before, strict=True)
    ]


def key_diversity(heads: list[Told], before: list[Scores]) -> list[Scores]:
    """How far a key points from the mean direction."""
    scores = []
    for told in heads:
        units = [[x / length(key) for x in key] for key in told.keys.values()]
        anchor = mean(units)
        scores.append(
            {t: 1 - dot(k, anchor) / length(k) / length(anchor) for t, k in told.keys.items()}
        )
    return scores


def leverage(heads: list[Told], before: list[Scores]) -> list[Scores]:
    """How much a key stands out in the least squares of all keys; 0 of a key that is alone."""
    scores = []
    for told in heads:
        middle = mean(list(told.keys.values()))
        centred = {
            t: [x - m for x, m in zip(key, middle, strict=True)] for t, key in told.keys.items()
        }
        channels = range(len(middle))
        gram = [[sum(k[a] * k[b] for k in centred.values()) for b in channels] for a in channels]
        trace = sum(gram[c][c] for c in channels)
        for c in channels:
            gram[c][c] += 1e-4 * trace / len(middle)
        scores.append(
            {t: dot(key, solved(gram, key)) if trace else 0.0 for t, key in centred.items()}
        )
    return scores


def long_keys(heads: list[Told], before: list[Scores]) -> list[Scores]:
    """A user's own: how long a key is."""
    return [{t: length(key) for t, key in told.keys.items()} for told in heads]


def pyramid(n: int, k: int, safe: int, layers: int, beta: float = 20) -> list[int]:
    """Slots of each layer, of which ``safe`` are window and sinks, for a prompt of n tokens."""
    slots = k - safe
    least = slots / beta
    most = 2 * slots - least
    if most > n - safe:
        most = max(slots, n - safe)
        least = 2 * slots - most
    ends = [0.0]
    for number in range(layers):
        part = most + (least - most) * number / (layers - 1) if layers > 1 else slots
        ends.append(ends[-1] + part)
    whole = [math.floor(end + 1e-6) for end in ends]
    return [safe + whole[number + 1] - whole[number] for number in range(layers)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def length(vector: list[float]) -> float:
    return math.sqrt(dot(vector, vector))


def mean(vectors: list[list[float]]) -> list[float]:
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """x of matrix x = right, by elimination with the largest pivot."""
    rows = [[*row, y] for row, y in zip(matrix, right, strict=True)]
    for c in range(len(rows)):
        pivot = max(range(c, len(rows)), key=lambda r: abs(rows[r][c]))
        rows[c], rows[pivot] = rows[pivot], rows[c]
        for r in range(len(rows)):
            if r != c:
                factor = rows[r][c] / rows[c][c]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[c], strict=True)]
    return [row[-1] / row[c] for c, row in enumerate(rows)]
