"""What ranks the tokens of a cache: a rule a file, and its name in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keyformer.errors import InputError
from keyformer.rules.accumulated import Accumulated
from keyformer.rules.keys import KeyDiversity, Leverage
from keyformer.rules.largest import Largest
from keyformer.rules.last import Last
from keyformer.rules.observed import Observed
from keyformer.rules.rule import Asked, Candidates, Rule, pooled

__all__ = ["RULES", "Asked", "Candidates", "Rule", "Shares", "pooled", "shares"]

RULES: dict[str, type[Rule]] = {
    "accumulated": Accumulated,
    "observed": Observed,
    "last": Last,
    "largest": Largest,
    "key_diversity": KeyDiversity,
    "leverage": Leverage,
}

Shares = tuple[tuple[Rule, float], ...]
"""Rules, and what part of the key tokens each chooses; the first chooses first."""


def shares(given: Any) -> Shares:
    """The rules that a configuration names.

    Parameters
    ----------
    given
        A name in ``RULES``, a :class:`Rule`, or several with a share each, which add up to 1: a
        mapping, or pairs.

    Raises
    ------
    InputError
        Naming what is none of these.
    """
    if isinstance(given, (str, Rule)):
        return ((_named(given), 1.0),)
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, Sequence) or not pairs or not all(map(_is_pair, pairs)):
        raise InputError(f"rule must be a name, a Rule, or a share for each of them, got {given!r}")
    for name, share in pairs:
        if not 0 < share <= 1:
            raise InputError(f"the share of rule {name} must be in (0, 1], got {share!r}")
    if abs(sum(share for _, share in pairs) - 1) > 1e-6:
        brief = ", ".join(f"{name}: {share:g}" for name, share in pairs)
        raise InputError(f"the shares of rules must add up to 1, got {brief}")
    return tuple((_named(name), float(share)) for name, share in pairs)


def _is_pair(pair: Any) -> bool:
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[1], (int, float))
        and not isinstance(pair[1], bool)
    )


def _named(rule: Any) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        raise InputError(f"rule must be one of {', '.join(RULES)}, or a Rule, got {rule!r}")
    return RULES[rule]()
