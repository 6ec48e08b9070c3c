"""Method full against transformers' own models, by generated cases.

``python tests/test_stock_cases.py --cases 20000`` prints how many cases of each family agree, and
``--case "Case(...)"`` runs one as a failing test prints it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.engine import ConjectureRunner
from stock_cases import (
    FULL,
    NAMES,
    Case,
    Step,
    Verdict,
    abilities,
    check,
    full_model,
)
from transformers.utils import logging

from keyformer import InputError, KeyformerCache

CASES = int(os.environ.get("KEYFORMER_CASES", "456"))
"""How many cases all families have together."""

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

Mask = tuple[str, ...]


def rarely(draw: st.DrawFn, one_in: int) -> bool:
    """False, and True once in so many draws; shrinks to False."""
    return draw(st.integers(0, one_in - 1)) == one_in - 1


def bits(draw: st.DrawFn, length: int) -> str:
    """Any zeros and ones; shrinks to ones."""
    return f"{2**length - 1 - draw(st.integers(0, 2**length - 1)):0{length}b}"


@st.composite
def columns(draw: st.DrawFn, tokens: int, real: bool) -> str:
    """A sequence's new columns: padded left, right, with holes, or not at all."""
    kind = draw(st.sampled_from(["none", "left", "right", "holes"] + ["all"] * (not real)))
    if kind == "all":
        return "0" * tokens
    if kind == "holes":
        some = bits(draw, tokens)
        return some if "1" in some or not real else some[1:] + "1"
    padding = 0 if kind == "none" else draw(st.integers(0, tokens - 1))
    text = "1" * (tokens - padding)
    return text.rjust(tokens, "0") if kind == "left" else text.ljust(tokens, "0")


def with_past(draw: st.DrawFn, read: str, hides: bool) -> str:
    """Columns of the past as they were read, or with some of the real ones hidden."""
    if not hides or not read:
        return read
    return "".join(min(pair) for pair in zip(read, bits(draw, len(read)), strict=True))


@st.composite
def masks(draw: st.DrawFn, batch: int, sizes: list[int]) -> list[Mask | None]:
    """A mask for each forward, or none where all that was read is real."""
    if not draw(st.booleans()):
        return [None] * len(sizes)
    given, read = [], [""] * batch
    for number, tokens in enumerate(sizes):
        if all("0" not in row for row in read) and rarely(draw, 4):
            given.append(None)
            read = [row + "1" * tokens for row in read]
            continue
        new = [draw(columns(tokens, real=number == 0)) for _ in range(batch)]
        hides = number > 0 and draw(st.booleans())
        past = [with_past(draw, row, hides) for row in read]
        given.append(tuple(p + n for p, n in zip(past, new, strict=True)))
        read = [r + n for r, n in zip(read, new, strict=True)]
    return given


def counted(mask: Mask, tokens: int) -> tuple[tuple[int, ...], ...]:
    """The positions that ``generate`` gives new tokens."""
    bits = torch.tensor([[int(digit) for digit in row] for row in mask])
    places = (bits.cumsum(dim=-1) - 1).clamp(min=0)
    return tuple(map(tuple, places[:, -tokens:].tolist()))


@st.composite
def packed(draw: st.DrawFn, tokens: int) -> tuple[int, ...]:
    """Positions of several texts in one row."""
    row: list[int] = []
    while len(row) < tokens:
        row += range(draw(st.integers(1, tokens - len(row))))
    return tuple(row)


@st.composite
def places(
    draw: st.DrawFn, batch: int, sizes: list[int], given: list[Mask | None], packs: bool
) -> list[tuple[tuple[int, ...], ...] | None]:
    """``position_ids`` for each forward, or none."""
    kinds = ["none", "generate", "offsets", "mixed"] + ["packed"] * packs
    kind = draw(st.sampled_from(kinds))
    if kind == "packed":
        return [tuple(draw(packed(sizes[0])) for _ in range(batch))]
    rows = draw(st.sampled_from([batch, 1])) if kind == "offsets" else batch
    reached = [draw(st.integers(-1, 20)) for _ in range(rows)] if kind == "offsets" else [-1] * rows
    result: list[tuple[tuple[int, ...], ...] | None] = []
    seen = 0
    for tokens, mask in zip(sizes, given, strict=True):
        seen += tokens
        this = draw(st.sampled_from(["none", "generate", "offsets"])) if kind == "mixed" else kind
        if this == "none":
            result.append(None)
        elif this == "generate":
            result.append(counted(mask or ("1" * seen,) * batch, tokens))
        else:
            for_rows = []
            for row in range(rows):
                gaps = draw(
                    st.lists(st.tuples(st.integers(0, tokens - 1), st.integers(1, 4)), max_size=3)
                )
                steps = [1] * tokens
                for at, more in gaps:
                    steps[at] += more
                for_rows.append(tuple(itertools.accumulate(steps, initial=reached[row]))[1:])
                reached[row] = for_rows[-1][-1]
            result.append(tuple(for_rows))
    return result


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    """Any case of a family."""
    can = abilities(family)
    batch = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["eval", "eval", "train", "grad", "checkpointing"]))
    checkpointing = mode == "checkpointing"  # which goes without a cache
    sizes = [draw(st.integers(1, 12))]
    if not checkpointing:
        sizes += draw(st.lists(st.sampled_from([1, 1, 2, 3, 6]), max_size=2))
    single = len(sizes) == 1
    caches = ["made"] + ["passed"] * (not checkpointing) + ["none", "none"] * single
    cache = draw(st.sampled_from(caches))
    attention = draw(st.sampled_from(can.attentions))
    switches = can.switches and rarely(draw, 6)
    switched = draw(st.sampled_from(can.attentions)) if switches else None
    given = draw(masks(batch, sizes))
    packs = single and cache == "none" and given == [None]
    positions = [None] * len(sizes)
    if can.positions:
        positions = draw(places(batch, sizes, given, packs))
    weights = can.outputs_attentions and attention == "eager" and switched in (None, "eager")
    steps = []
    for tokens, mask, place in zip(sizes, given, positions, strict=True):
        square = None
        if cache == "none" and can.square_masks and rarely(draw, 4):
            square = draw(st.sampled_from(can.square_masks))
        keep: int | tuple[int, ...] | None = None
        if rarely(draw, 3):
            chosen = st.lists(st.integers(0, tokens - 1), min_size=1, unique=True)
            keep = draw(st.integers(0, tokens) | chosen.map(sorted).map(tuple))
        steps.append(
            Step(
                tokens=tokens,
                mask=mask,
                positions=place,
                embeds=rarely(draw, 4),
                keep=keep,
                token_types=can.token_types and rarely(draw, 4),
                hidden_states=rarely(draw, 5),
                attentions=weights and rarely(draw, 3),
                plain=rarely(draw, 6),
                square=square,
            )
        )
    case = Case(
        family=family,
        steps=tuple(steps),
        batch=batch,
        attention=attention,
        switched=switched,
        cache=cache,
        mode="train" if checkpointing else mode,
        checkpointing=checkpointing,
        mask_dtype=draw(st.sampled_from(["int64", "bool", "float32"])),
        seed=draw(st.integers(0, 999)),
    )
    last = len(steps) - 1
    if steps[last].keep is None and case.labelled(last).any() and draw(st.booleans()):
        case = Case(**{**vars(case), "labels": True})
    return case


class Cases:
    """Different cases of a family, and how each ended.

    Attributes
    ----------
    verdicts
        By case; drawing one again runs nothing.
    """

    def __init__(self, family: str, padding: bool = False) -> None:
        self.family, self.padding = family, padding
        self.verdicts: dict[Case, Verdict] = {}

    def run(self, count: int, start: int = 0, to_the_end: bool = False) -> None:
        """Draw and check so many; the same ones for the same ``start``.

        Raises
        ------
        AssertionError
            Of the first mismatch, made as simple as can be, unless it goes on ``to_the_end``.
        """
        failed = False

        @seed(f"{self.family} {start}")
        @settings(
            max_examples=2 * count,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(case=cases(self.family))
        def act(case: Case) -> None:
            nonlocal failed
            if case not in self.verdicts:
                if len(self.verdicts) >= count and not failed:
                    return
                self.verdicts[case] = check(case, self.padding)
            if not to_the_end and (lines := self.verdicts[case].lines):
                failed = True
                raise AssertionError("\n".join([repr(case), *lines]))

        # It would draw most cases as copies of earlier ones with a part changed.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                ConjectureRunner, "generate_mutations_from", lambda *_: None, raising=False
            )
            act()

    def ends(self) -> Counter[str]:
        """How many ended how."""
        return Counter(
            "refused by both" if v.refused and not v.lines else "mismatches" if v.lines else "equal"
            for v in self.verdicts.values()
        )

    def kinds(self) -> dict[str, list[Case]]:
        """The cases that do not agree by what is first to differ, the shortest first."""
        found: dict[str, list[Case]] = {}
        for case in sorted(self.verdicts, key=lambda case: len(repr(case))):
            if lines := self.verdicts[case].lines:
                kind = re.sub(r"forward \d+: | of forward \d+|, layer \d+", "", lines[0])
                kind = re.split(r": [\d.e+-]+ apart| \(|, got|: \[", kind)[0]
                found.setdefault(kind[:70], []).append(case)
        return found


@pytest.mark.parametrize("family", NAMES)
def test_full_equals_stock(family: str) -> None:
    """Logits, loss, gradients, hidden states and attentions of each forward."""
    drawn, count = Cases(family), math.ceil(CASES / len(NAMES))
    drawn.run(count)
    ends = drawn.ends()
    assert ends["equal"] >= 0.9 * count and ends.total() == count, ends


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("padded", ["0011", "1100", "1010"])
def test_padding_cannot_be_shown_later(family: str, padded: str) -> None:
    """It was read as nothing, so a mask that shows it is refused, in one line."""
    model = full_model(family, abilities(family).attentions[0])
    held = KeyformerCache(model.config, FULL)
    mask = torch.tensor([[int(digit) for digit in padded]])
    with torch.no_grad():
        model(torch.arange(1, 5)[None], attention_mask=mask, past_key_values=held)
        with pytest.raises(InputError) as error:
            shown = torch.ones(1, 5, dtype=torch.int64)
            model(torch.tensor([[7]]), attention_mask=shown, past_key_values=held)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["bloom", "falcon alibi"])
def test_what_stock_refuses_is_refused(family: str) -> None:
    """Models that count a mask's tokens take none of four dimensions."""
    attention = abilities(family).attentions[0]
    case = Case(family, (Step(3, square="causal"),), attention=attention, cache="none")
    verdict = check(case)
    assert verdict.refused and not verdict.lines


def ended(family: str, count: int, start: int, padding: bool) -> Cases:
    """So many cases of a family, whether they agree or not."""
    drawn = Cases(family, padding)
    drawn.run(count, start, to_the_end=True)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """Run many cases, or one, and print how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=CASES, help="of all families together")
    parser.add_argument("--families", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--case", help="run this one alone, as it was printed")
    parser.add_argument(
        "--padding", action="store_true", help="compare logits of padding as well, where it sees"
    )
    options = parser.parse_args(arguments)
    if options.case:
        verdict = check(eval(options.case, {"Case": Case, "Step": Step}), options.padding)
        print("\n".join(verdict.lines) or verdict.refused or "equal")
        return bool(verdict.lines)
    count = math.ceil(options.cases / len(options.families))
    work = partial(ended, count=count, start=options.seed, padding=options.padding)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    began = time.perf_counter()
    columns = ("cases", "equal", "refused by both", "mismatches")
    print("{:20}".format("family"), *columns, sep="  ")

    def show(family: str, ends: Counter[str]) -> None:
        counts = {**ends, "cases": ends.total()}
        print(f"{family:20}", *(f"{counts.get(n, 0):{len(n)}}" for n in columns), sep="  ")

    everything, total = [], Counter[str]()
    with ProcessPoolExecutor(options.jobs) as pool:
        for drawn in pool.map(work, options.families):
            everything.append(drawn)
            show(drawn.family, ends := drawn.ends())
            total += ends
    show("all", total)
    print(f"{time.perf_counter() - began:.0f} s, seed {options.seed}")
    for drawn in everything:
        for kind, examples in drawn.kinds().items():
            print(
                f"\n{drawn.family}: {kind}: {len(examples)} cases, the shortest\n  {examples[0]!r}"
            )
            print("\n".join(f"    {line}" for line in drawn.verdicts[examples[0]].lines[:4]))
    return bool(total["mismatches"])


if __name__ == "__main__":
    raise SystemExit(main())
