"""ROUGE as the paper reports it: rouge-score with stemming, in percent."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

from nltk.stem.porter import PorterStemmer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKENIZERS = ("default", "unicode")

# Untrained, so it needs no download: it splits at sentence-ending punctuation.
_SENTENCES = PunktSentenceTokenizer()

UNSPACED = (
    *((0x0E00, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Tibetan, Burmese; Khmer
    *((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),  # kana, Han
)
"""Code points of scripts that put no spaces between words."""


def rouge(
    predictions: Sequence[str],
    references: Sequence[str],
    tokenizer: str = "default",
    workers: int = 1,
) -> list[dict[str, float]]:
    """F-measure of each prediction against its reference, times 100.

    Parameters
    ----------
    tokenizer
        "default", rouge-score's own, as in the paper: it reads a to z and digits and drops
        everything else, of which a warning is logged. "unicode", see
        :class:`UnicodeTokenizer`: the same on English, and words or characters of any script.
    workers
        Processes that share the pairs; 1 is this one.

    Returns
    -------
    list
        For each pair a dict with rouge1, rouge2, rougeL and rougeLsum (sentence by sentence).
    """
    dropped = sum(map(_mostly_dropped, references)) if tokenizer == "default" else 0
    if dropped:
        _warn(
            f"ROUGE drops most letters of {dropped} of {len(references)} references, and with"
            " them of what is compared: its default tokenizer reads a to z only;"
            " --rouge_tokenizer unicode reads all scripts"
        )
    score, pairs = partial(_score, tokenizer), [*zip(predictions, references, strict=True)]
    workers = min(workers, len(pairs))
    if workers <= 1:
        return [*map(score, pairs)]
    with ProcessPoolExecutor(workers) as pool:
        return [*pool.map(score, pairs, chunksize=max(1, len(pairs) // (4 * workers)))]


def _score(tokenizer: str, pair: tuple[str, str]) -> dict[str, float]:
    prediction, reference = map(_a_sentence_a_line, pair)
    found = _scorer(tokenizer).score(reference, prediction)
    return {name: 100 * found[name].fmeasure for name in METRICS}


@cache
def _scorer(tokenizer: str) -> RougeScorer:
    if tokenizer == "default":
        return RougeScorer(METRICS, use_stemmer=True)
    return RougeScorer(METRICS, tokenizer=UnicodeTokenizer())


class UnicodeTokenizer(Tokenizer):
    """Words of letters and digits of any script, and single characters where none has spaces.

    A letter keeps its marks, case does not count. English words are stemmed, so that a text in
    ASCII has the tokens that rouge-score's own tokenizer gives it.
    """

    def __init__(self) -> None:
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, in order."""
        tokens: list[str] = []
        goes_on = False  # whether a letter would belong to the last token
        in_token = False  # whether a mark would
        for char in unicodedata.normalize("NFKC", text.casefold()):
            kind = unicodedata.category(char)[0]
            unspaced = any(first <= ord(char) <= last for first, last in UNSPACED)
            if (kind == "M" and in_token) or (kind in "LN" and goes_on and not unspaced):
                tokens[-1] += char
            elif kind in "LN":
                tokens.append(char)
                goes_on, in_token = not unspaced, True
            else:
                goes_on = in_token = False
        return [
            self._stemmer.stem(token) if token.isascii() and len(token) > 3 else token
            for token in tokens
        ]


def _mostly_dropped(text: str) -> bool:
    """Whether rouge-score's own tokenizer reads fewer than half of a text's letters."""
    letters = [char for char in text if char.isalpha()]
    return 2 * sum(char.isascii() for char in letters) < len(letters)


@cache
def _warn(message: str) -> None:
    """Once, however many rows are scored."""
    logging.getLogger(__name__).warning(message)


def mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean over the pairs, rounded to 4 decimals as the paper prints them."""
    return {name: round(sum(s[name] for s in scores) / len(scores), 4) for name in METRICS}


def _a_sentence_a_line(text: str) -> str:
    return "\n".join(_SENTENCES.tokenize(text.strip()))
