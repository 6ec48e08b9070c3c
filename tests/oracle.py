"""Algorithm 1 of the paper, one head of one sequence, on plain lists.

Written from the paper alone, quadratic and slow: every query walks over every token it can
see, and eviction picks survivors one at a time. Nothing here looks at keyformer.cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Token:
    """One cached token: f_theta is its accumulated score (section 3.3.2)."""

    position: int
    key: list[float]
    value: list[float]
    f_theta: float = 0.0


@dataclass
class Head:
    """One head's cache: k tokens, of which the w most recent and the sinks are safe."""

    k: int
    w: int
    sinks: int
    scale: float
    slope: float
    noise: Callable[[int, int], float]
    """zeta for a query position and a key position (Eq. 4)."""
    new_positions: bool = False
    """Whether places are those in the short sequence of the tokens left."""
    rotates: bool = False
    """Whether queries and keys are rotated to their places (RoPE)."""
    damping: float = 1.0
    forgetting: float = 1.0
    age_power: float = 0.0
    """Scores are divided by this power of the number of queries that saw the token."""
    frozen: bool = False
    """Whether key tokens are chosen once, after the first prompt."""
    dilation: int = 0
    scored: bool = True
    """Where the recent window is all there is, nothing is scored."""
    tokens: list[Token] = field(default_factory=list)
    seen: int = 0
    keys_end: int | None = None
    """Where the recent window began when the first prompt had been read."""

    def step(self, queries, keys, values, tau: float, chunk: int = 10**9) -> list[list[float]]:
        """Attend with new tokens (a prompt or a single one), score, evict; the outputs.

        A prompt longer than ``chunk`` is read, and evicted to the budget, in pieces.
        """
        outputs = [[] for _ in queries]
        while keys:
            now = [group[:chunk] for group in queries], keys[:chunk], values[:chunk]
            queries, keys, values = (
                [group[chunk:] for group in queries],
                keys[chunk:],
                values[chunk:],
            )
            for output, more in zip(outputs, self.attend(*now, tau), strict=True):
                output += more
            self.evict({t: t.f_theta for t in self.tokens}, prompt_goes_on=bool(keys))
        return outputs

    def attend(self, queries, keys, values, tau: float) -> list[list[float]]:
        """Attend with new tokens and add up scores; the outputs.

        ``queries``, ``keys`` and ``values`` hold a list of vectors for each query head that
        shares this key/value head: queries[g][i], keys[i], values[i].
        """
        outputs = [[] for _ in queries]
        factor = 1.0 if self.keys_end is None else self.damping
        for i in range(len(keys)):
            self.tokens.append(Token(self.seen, keys[i], values[i]))
            self.seen += 1
        first_new = len(self.tokens) - len(keys)
        for i in range(len(keys)):
            here = self.tokens[first_new + i].position
            visible = [t for t in self.tokens if t.position <= here]
            place = self.place(visible[-1])
            for t in self.tokens[: first_new + i]:
                t.f_theta *= self.forgetting  # one more query has come
            for g, group in enumerate(queries):
                query = self.turned(group[i], place)
                x = [
                    self.scale
                    * sum(
                        a * b for a, b in zip(query, self.turned(t.key, self.place(t)), strict=True)
                    )
                    + self.slope_of(g) * (self.place(t) - place)
                    for t in visible
                ]
                attention = softmax(x)
                outputs[g].append(
                    [
                        sum(p * t.value[c] for p, t in zip(attention, visible, strict=True))
                        for c in range(len(values[i]))
                    ]
                )
                y = [
                    a + self.noise_of(g)(here, t.position) for a, t in zip(x, visible, strict=True)
                ]
                for t, f in zip(visible, softmax([b / tau for b in y]), strict=True):
                    t.f_theta += factor * f if self.scored else 0.0
        return outputs

    def place(self, token: Token) -> int:
        """Where the model's position scheme sees a token: the short sequence is rebuilt."""
        return self.tokens.index(token) if self.new_positions else token.position

    def turned(self, vector: list[float], place: int) -> list[float]:
        """The vector's pairs as complex numbers, each turned by the place times its frequency."""
        return rotate(vector, place) if self.rotates else vector

    def slope_of(self, group: int) -> float:
        return self.slope[group] if isinstance(self.slope, list) else self.slope

    def noise_of(self, group: int) -> Callable[[int, int], float]:
        return self.noise[group] if isinstance(self.noise, list) else self.noise

    def evict(self, scores: dict[Token, float], prompt_goes_on: bool = False) -> None:
        """S_w: the recent window. S_key: the best of the rest. Keep their union."""
        scores = {t: f / (self.seen - t.position) ** self.age_power for t, f in scores.items()}
        in_step = [p for p in range(self.seen) if p % (self.dilation + 1) == 0]
        window = range(self.seen - self.w * (self.dilation + 1), self.seen)
        recent = [t for t in self.tokens if t.position in window and t.position in in_step]
        safe = [t for t in self.tokens if t.position < self.sinks and t not in recent]
        if self.frozen and self.keys_end is not None:
            safe += [
                t for t in self.tokens if t.position < self.keys_end and t not in safe + recent
            ]
        rest = [t for t in self.tokens if t not in recent and t not in safe]
        kept = recent + safe
        while rest and len(kept) < self.k:
            best = rest[0]
            for t in rest:
                if scores[t] > scores[best]:  # of two equals the older one stays
                    best = t
            rest.remove(best)
            kept.append(best)
        self.tokens = sorted(kept, key=lambda t: t.position)
        if self.keys_end is None and not prompt_goes_on:
            self.keys_end = window.start


def rotate(vector: list[float], place: int) -> list[float]:
    """RoPE on neighbouring pairs, frequencies 10000 ** (-2 j / d)."""
    turned = []
    for j in range(0, len(vector), 2):
        angle = place * 10000 ** (-j / len(vector))
        number = complex(vector[j], vector[j + 1]) * complex(math.cos(angle), math.sin(angle))
        turned += [number.real, number.imag]
    return turned


def softmax(logits: list[float]) -> list[float]:
    """exp(x_i) / sum_j exp(x_j)."""
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    total = sum(powers)
    return [p / total for p in powers]
