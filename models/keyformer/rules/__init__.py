"""What ranks the tokens of a cache: a rule a file, and its name in one table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from keyformer.errors import InputError
from keyformer.rules.accumulated import Accumulated
from keyformer.rules.keys import KeyDiversity, Leverage
from keyformer.rules.largest import Largest
from keyformer.rules.last import Last
from keyformer.rules.observed import Observed
from keyformer.rules.peak import Peak
from keyformer.rules.recall import Recall
from keyformer.rules.rule import Asked, Candidates, Rule, is_number, pooled

__all__ = ["RULES", "Asked", "Candidates", "Rule", "Shares", "formula", "pooled", "shares"]

RULES: dict[str, type[Rule]] = {
    "accumulated": Accumulated,
    "recall": Recall,
    "observed": Observed,
    "last": Last,
    "peak": Peak,
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
        A name in ``RULES``, with settings where it has any: ``last(pooling=5)``; a formula of
        several with their shares, which add up to 1: ``0.9*accumulated + 0.1*last``; a
        :class:`Rule`; or a mapping from names and rules to their shares, or pairs of them.

    Raises
    ------
    InputError
        Naming what is none of these.
    """
    if isinstance(given, (Rule, type)):
        return ((_named(given), 1.0),)
    if isinstance(given, str):
        given = _parts(given)
        if isinstance(given, str):
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


def formula(of: Shares) -> str:
    """What :func:`shares` reads them from, rules of your own by what they print as."""
    if len(of) == 1:
        return _written(of[0][0])
    return " + ".join(f"{share:.12g}*{_written(rule)}" for rule, share in of)


def _written(rule: Rule) -> str:
    """A name in ``RULES`` and the settings that are not the defaults."""
    name = next((name for name, of in RULES.items() if of is type(rule)), None)
    if name is None:
        return repr(rule)
    values = {field: getattr(rule, field.name) for field in _fields(type(rule))}
    own = [f"{of.name}={value}" for of, value in values.items() if value != of.default]
    return f"{name}({','.join(own)})" if own else name


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and is_number(pair[1])


def _parts(text: str) -> str | list[tuple[str, float]]:
    """The names and shares of a formula; the text itself if it is one name."""
    pairs = []
    parts = re.split(r"\+(?![^(]*\))", text)  # none of 1e+3 in brackets
    for part in parts:
        share, star, name = part.rpartition("*")
        if not star and len(parts) == 1:
            return text
        try:
            pairs.append((name.strip(), float(share)))
        except ValueError:
            raise InputError(
                "rule must give each of several rules its share, as in 0.9*accumulated + 0.1*last,"
                f" got {text!r}"
            ) from None
    return pairs


def _named(rule: Any) -> Rule:
    """A rule by its name and settings."""
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise InputError(f"rule takes an instance, as {rule.__name__}(), got the class itself")
    name, bracket, rest = rule.strip().partition("(") if isinstance(rule, str) else ("", "", "")
    if name not in RULES or (bracket and not rest.endswith(")")):
        raise InputError(f"rule must be one of {', '.join(RULES)}, or a Rule, got {rule!r}")
    settings: dict[str, float] = {}
    known = {field.name: field for field in _fields(RULES[name])}
    for setting in filter(None, rest[:-1].split(",")):
        key, _, value = (text.strip() for text in setting.partition("="))
        try:
            number = int(value) if value.isdecimal() else float(value)
        except ValueError:
            number = None
        if key not in known or number is None:
            allowed = f"numbers for {', '.join(known)}" if known else "no settings"
            raise InputError(f"rule {name} takes {allowed}, got {rule!r}")
        settings[key] = number
    missing = [key for key, of in known.items() if of.default is MISSING and key not in settings]
    if missing:
        raise InputError(f"rule {name} needs a number for {', '.join(missing)}, got {rule!r}")
    return RULES[name](**settings)


def _fields(of: type[Rule]) -> tuple[Field, ...]:
    """What can be set in a rule: nothing if it is no dataclass."""
    return fields(of) if is_dataclass(of) else ()
