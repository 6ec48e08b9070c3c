"""ROUGE as the paper reports it: rouge-score with stemming, in percent."""

from __future__ import annotations

from collections.abc import Sequence

from nltk.tokenize.punkt import PunktSentenceTokenizer
from rouge_score.rouge_scorer import RougeScorer

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# Untrained, so it needs no download: it splits at sentence-ending punctuation.
_SENTENCES = PunktSentenceTokenizer()


def rouge(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """F-measure of each prediction against its reference, times 100.

    Returns
    -------
    list
        For each pair a dict with rouge1, rouge2, rougeL and rougeLsum (sentence by sentence).
    """
    scorer = RougeScorer(METRICS, use_stemmer=True)
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        result = scorer.score(_a_sentence_a_line(reference), _a_sentence_a_line(prediction))
        scores.append({name: 100 * result[name].fmeasure for name in METRICS})
    return scores


def mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Each metric's mean over the pairs, rounded to 4 decimals as the paper prints them."""
    return {name: round(sum(s[name] for s in scores) / len(scores), 4) for name in METRICS}


def _a_sentence_a_line(text: str) -> str:
    return "\n".join(_SENTENCES.tokenize(text.strip()))
