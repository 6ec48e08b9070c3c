"""What is asked for: questions about an article, needles in a haystack, a chat's first turn.

An item is ``{"messages": [{"role": ..., "content": ...}, ...], "answer": ...}``: a conversation
that ends with a question, and what its answer must contain. A ``CUT`` in a message ends a forward,
after which the cache is evicted; the question after it is asked of what is left.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from keyformer.config import InputError
from keyformer.evaluation.data import TASKS, Item, assistant, load_items, user

CUT = "\x1e"
"""ASCII's record separator."""

TURNS = 10
"""Between the article and the question about it."""

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
        if not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"{path}: item {index} is no article with questions: it needs 'questions', a"
                " list of objects with 'question' and 'answer'"
            )
    return articles


def _asked(question: str, article: str = "the article") -> str:
    return f"Answer the question with words from {article}.\nQuestion: {question}"


def questions(articles: Sequence[Item], later: bool) -> list[Item]:
    """Each article with each of its questions.

    Parameters
    ----------
    later
        Whether the question comes after the article was evicted, instead of with it.
    """
    between = CUT if later else ""
    return [
        {
            "messages": [user(f"{of['input']}{between}\n\n{_asked(one['question'])}")],
            "answer": one["answer"],
        }
        for of in articles
        for one in of["questions"]
    ]


def needles(articles: Sequence[Item], words: int, depth: float, count: int) -> list[Item]:
    """A number in one sentence among articles, and a question for it at the end.

    Parameters
    ----------
    words
        Of the haystack.
    depth
        Where the needle is, in percent of the haystack's sentences.
    count
        How many; each has a haystack, a number and an object of its own.
    """
    found = []
    for number in range(count):
        drawn = random.Random(f"{words} {depth} {number}")
        hay: list[str] = []
        start = drawn.randrange(len(articles))
        for more in range(len(articles)):
            hay += re.split(r"(?<=[.!?])\s+", articles[(start + more) % len(articles)]["input"])
            if sum(len(sentence.split()) for sentence in hay) >= words:
                break
        else:
            raise InputError(f"there are fewer than {words} words in the articles")
        while sum(len(sentence.split()) for sentence in hay) > words:
            hay.pop()
        what = f"{drawn.choice(COLOURS)} {drawn.choice(OBJECTS)}"
        code = str(drawn.randrange(10_000, 100_000))
        at = round(depth / 100 * len(hay))
        hay.insert(at, f"The number of the {what} is {code}.")
        asked = f"\n\nWhat is the number of the {what}? Answer with the number."
        found.append({"messages": [user(" ".join(hay) + asked)], "answer": code})
    return found


def chats(articles: Sequence[Item]) -> list[Item]:
    """An article, ``TURNS`` turns about others, each evicted, then a question about the first."""
    found = []
    for number, article in enumerate(articles):
        said = [
            user(f"{article['input']}\n\nSummarize this article in one sentence."),
            assistant(article["output"] + CUT),
        ]
        for turn in range(1, TURNS + 1):
            other = articles[(number + turn) % len(articles)]
            opening = other["input"].split("\n\n")[0]
            said += [
                user(f"{opening}\n\nWhat is this about?"),
                assistant(other["output"] + CUT),
            ]
        one = article["questions"][number % len(article["questions"])]
        asked = _asked(one["question"], "the first article")
        found.append({"messages": [*said, user(asked)], "answer": one["answer"]})
    return found


def answered(text: str, answer: str) -> bool:
    """Whether a text contains an answer, whatever its case and punctuation."""

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    return f" {plain(answer)} " in f" {plain(text)} "
