"""What is asked for: questions about an article, needles in a haystack and in a chat's first turn.

An item is ``{"messages": [{"role": ..., "content": ...}, ...], "answer": ...}``: a conversation
that ends with a question, and what its answer must contain. A ``CUT`` in a message ends a forward,
after which the cache is evicted; the question after it is asked of what is left. What stands
between ``AHEAD`` and it are questions asked ahead: read with the text, and forgotten.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from keyformer.config import InputError
from keyformer_evaluation.tasks.data import TASKS, Item, assistant, is_text, load_items, user

CUT = "\x1e"
"""ASCII's record separator."""

AHEAD = "\x1f"
"""ASCII's unit separator."""

TURNS = 10
"""Between a chat's first turn and the question about it."""

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "grey", "brown", "silver", "purple")
OBJECTS = ("suitcase", "bicycle", "locker", "umbrella", "notebook", "lantern", "kayak", "toolbox")


def load_articles(path: Path) -> list[Item]:
    """Articles with a summary and questions, as summarization/data/articles.json has them.

    Raises
    ------
    InputError
        If the file cannot be read or an item is no such article.
    """
    articles = load_items(path, TASKS["summarization"])
    for index, article in enumerate(articles):
        asked = article.get("questions")
        texts: list[object] = []
        for one in asked if isinstance(asked, list) and asked else [None]:
            given = one if isinstance(one, dict) else {}
            texts += [given.get("question"), given.get("answer")]
        if not all(isinstance(text, str) and is_text(text) and _words(text) for text in texts):
            raise InputError(
                f"{path}: item {index} is no article with questions: it needs 'questions', a"
                " list of objects with 'question' and 'answer', texts with a word in them"
            )
    return articles


def _instructed(question: str) -> str:
    return f"Answer the question with words from the article.\nQuestion: {question}"


def _after(question: str, ahead: str | None) -> str:
    """A question at the end of a text, or after it was evicted."""
    if ahead is None:
        return f"\n\n{question}"
    return (f"{AHEAD}\n\n{ahead}" if ahead else "") + f"{CUT}\n\n{question}"


def questions(articles: Sequence[Item], ahead: str | None = None) -> list[Item]:
    """Each article with each of its questions.

    Parameters
    ----------
    ahead
        None: the question comes with the article. Else it comes after that was evicted, and with
        it came these questions, if there are any.
    """
    return [
        {
            "messages": [user(of["input"] + _after(_instructed(one["question"]), ahead))],
            "answer": one["answer"],
        }
        for of in articles
        for one in of["questions"]
    ]


def needles(
    articles: Sequence[Item],
    words: int,
    depth: float,
    count: int,
    ahead: str | None = None,
) -> list[Item]:
    """A number in one sentence among articles, and a question for it at the end.

    Parameters
    ----------
    words
        Of the haystack.
    depth
        Where the needle is, in percent of the haystack's sentences.
    count
        How many; for each haystack, number and object are drawn anew.
    ahead
        That of :func:`questions`.
    """
    found = []
    for number in range(count):
        drawn = random.Random(f"{words} {depth:g} {number}")
        hay: list[str] = []
        start = drawn.randrange(len(articles))
        for more in range(len(articles)):
            hay += _sentences(articles[(start + more) % len(articles)]["input"])
            if sum(len(sentence.split()) for sentence in hay) >= words:
                break
        else:
            raise InputError(f"there are fewer than {words} words in the articles")
        while sum(len(sentence.split()) for sentence in hay) > words:
            hay.pop()
        needle, question, code = _needle(drawn)
        hay.insert(round(depth / 100 * len(hay)), needle)
        text = " ".join(hay) + _after(question, ahead)
        found.append({"messages": [user(text)], "answer": code})
    return found


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def _needle(drawn: random.Random) -> tuple[str, str, str]:
    """A sentence with a number, the question for it, and the number."""
    what = f"{drawn.choice(COLOURS)} {drawn.choice(OBJECTS)}"
    code = str(drawn.randrange(10_000, 100_000))
    question = f"What is the number of the {what}? Answer with the number."
    return f"The number of the {what} is {code}.", question, code


def chats(articles: Sequence[Item]) -> list[Item]:
    """Turns of one question each, the first about an article with a needle, then one for that.

    The other ``TURNS`` are about paragraphs of others. The cache is evicted after each turn.
    """
    found = []
    for number, article in enumerate(articles):
        drawn = random.Random(number)
        needle, question, code = _needle(drawn)
        hay = _sentences(article["input"])
        hay.insert(drawn.randrange(len(hay) + 1), needle)
        one = drawn.choice(article["questions"])
        said = [user(f"{' '.join(hay)}\n\n{one['question']}"), assistant(one["answer"] + CUT)]
        for turn in range(1, TURNS + 1):
            other = articles[(number + turn) % len(articles)]
            one = drawn.choice(other["questions"])
            parts = other["input"].split("\n\n")
            text = next((of for of in parts if answered(of, one["answer"])), parts[0])
            said += [user(f"{text}\n\n{one['question']}"), assistant(one["answer"] + CUT)]
        asked = f"Back to the first article. {question}"
        found.append({"messages": [*said, user(asked)], "answer": code})
    return found


def answered(text: str, answer: str) -> bool:
    """Whether a text contains an answer, whatever its case and punctuation."""
    return f" {_words(answer)} " in f" {_words(text)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
