"""What is asked for after eviction: items, texts fed by hand, measures and their studies."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script, small_stock
from families import small_model
from originals import write_original

from keyformer import InputError, KeyformerConfig, enable_keyformer, load_model
from keyformer_evaluation.studies.feeding import Part, judge, read, write
from keyformer_evaluation.studies.measures import Agreement, Answered, Reference
from keyformer_evaluation.studies.study import ARTICLES
from keyformer_evaluation.studies.sweep import Cell, carry_out, summarize
from keyformer_evaluation.studies.tables import MINUS, with_differences
from keyformer_evaluation.tasks.data import (
    TASKS,
    assistant,
    conversation,
    load_items,
    prompt_room,
    trained_room,
    user,
)
from keyformer_evaluation.tasks.retrieval import (
    AHEAD,
    CUT,
    TURNS,
    answered,
    chats,
    load_articles,
    needles,
    questions,
)

ROOT = Path(__file__).parents[1]
FULL = KeyformerConfig.preset("full")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("retrieval") / "mpt-7b-keyformer", "mpt", "bin")


@pytest.fixture
def articles(tmp_path) -> Path:
    """Four short ones."""
    path = tmp_path / "articles.json"
    items = [
        {
            "article": f"The key is in town {n}. Others stay there.\n\nThe recent tokens leave.",
            "summary": "The key stays.",
            "questions": [{"question": "Where is it?", "answer": f"town {n}"}] * 2,
        }
        for n in range(4)
    ]
    path.write_text(json.dumps(items))
    return path


def said(item) -> str:
    return "".join(message["content"] for message in item["messages"])


def test_questions_come_with_the_article_or_after_it() -> None:
    articles = load_articles(ARTICLES)
    now, later = (questions(articles, ahead) for ahead in (None, ""))
    assert len(now) == len(later) == sum(len(of["questions"]) for of in articles)
    for item, other in zip(now, later, strict=True):
        assert item["answer"] == other["answer"] and CUT not in said(item)
        article, question = said(other).split(CUT)
        assert answered(article, item["answer"]) and not answered(question, item["answer"])
        assert said(item) == article + question


def test_questions_asked_ahead_are_read_with_the_text() -> None:
    articles = load_articles(ARTICLES)[:2]
    given = "", "Who is it? When?"
    for make in (questions, partial(needles, words=300, depth=50, count=2)):
        for later, ahead in zip(*(make(articles, ahead=text) for text in given), strict=True):
            text, question = said(ahead).split(CUT)
            assert text.endswith(AHEAD + "\n\nWho is it? When?")
            assert said(later) == text.split(AHEAD)[0] + CUT + question


@pytest.mark.parametrize("depth", [0, 30, 100])
def test_a_needle_is_where_it_should_be(depth) -> None:
    articles = load_articles(ARTICLES)
    found = needles(articles, 300, depth, 6)
    assert len({item["answer"] for item in found}) == 6
    assert found == needles(articles, 300, float(depth), 6)
    assert found != needles(articles, 300, depth + 0.5, 6)
    for item in found:
        hay, _ = said(item).split("\n\nWhat is the number")
        before, after = hay.split(f" is {item['answer']}.")
        needle = 6  # words before the number
        words = [len(text.split()) for text in (before, after)]
        words[0] -= needle
        assert 260 < sum(words) <= 300
        assert 100 * words[0] / sum(words) == pytest.approx(depth, abs=12)
    with pytest.raises(InputError, match="fewer than 300 words"):
        needles([{"input": "Too short."}], 300, depth, 1)


def test_a_chat_asks_for_its_first_turn() -> None:
    articles = load_articles(ARTICLES)
    found = chats(articles)
    assert len(found) == len(articles)
    for item, article in zip(found, articles, strict=True):
        parts = said(item).split(CUT)
        assert len(parts) == TURNS + 2  # the article, the turns, the question
        assert f" is {item['answer']}." in parts[0] and item["answer"] not in "".join(parts[1:])
        assert all(word in parts[0] for word in article["input"].split())
        assert [message["role"] for message in item["messages"][:3]] == [
            "user",
            "assistant",
            "user",
        ]


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is 19 miles away.", "19 Miles", True),
        ("It is 190 miles away.", "19 miles", False),
        ("That cost $214!", "$214", True),
        ("", "x", False),
        ("The sailing-club.", "the sailing club", True),
    ],
)
def test_answers_are_looked_for_word_by_word(text, answer, right) -> None:
    assert answered(text, answer) is right


@pytest.mark.parametrize(
    "asked",
    [
        *(None, [], [{"question": "Where?"}], ["Where?"], "Where?"),
        *([{"question": "Where?", "answer": answer}] for answer in ("", "...", "\ud800")),
    ],
)
def test_articles_without_questions_are_named(tmp_path, asked) -> None:
    path = tmp_path / "articles.json"
    path.write_text(json.dumps([{"article": "A.", "summary": "B.", "questions": asked}]))
    with pytest.raises(InputError, match="item 0 is no article with questions"):
        load_articles(path)


def test_messages_as_prompts() -> None:
    messages = [user("Hi."), assistant("Yes?"), user("Why?")]
    assert conversation(messages, None, "none") == "Hi.\n\nYes?\n\nWhy?\n\n"
    alpaca = conversation(messages, None, "alpaca")
    assert alpaca.endswith("Yes?\n\n### Instruction:\nWhy?\n\n### Response:\n")


TEXTS = [[[5, 7, 9, 11, 2, 3], [4, 6]], [[8, 3, 1], [9, 9, 2, 7, 1]], [[1, 2, 3, 4], [5]]]
"""Three, each in two parts."""


@torch.no_grad()
def test_parts_under_a_full_cache_are_one_text(arch) -> None:
    """What is read, judged and written is what stock transformers gives."""
    stock = small_stock(arch)
    expected = [stock(torch.tensor([a + b])).logits[0, -1] for a, b in TEXTS]
    greedy = [
        stock.generate(torch.tensor([a + b]), max_new_tokens=5)[0, len(a + b) :].tolist()
        for a, b in TEXTS
    ]
    follow = [[3, 1, 4], [1], [5, 9]]
    losses = []
    for (a, b), after in zip(TEXTS, follow, strict=True):
        logits = stock(torch.tensor([a + b + after])).logits[0, len(a + b) - 1 : -1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none")
        )
    model = enable_keyformer(stock, FULL)
    for batch in batches(arch):
        texts = [[*map(Part, TEXTS[number])] for number in batch]
        cache, logits = read(model, texts, FULL, batch, 5)
        assert_close(logits, torch.stack([expected[number] for number in batch]))
        judged = judge(model, cache, logits, [follow[number] for number in batch])
        for number, (lost, hit) in zip(batch, judged, strict=True):
            assert_close(lost, losses[number])
            assert bool(hit[0]) == (int(expected[number].argmax()) == follow[number][0])
        written = write(model, *read(model, texts, FULL, batch, 5), 5)
        assert written == [greedy[number] for number in batch]


def batches(arch: str) -> list[list[int]]:
    """The texts at once, or alone where padding between tokens counts as distance."""
    return [[0], [1], [2]] if arch == "mpt" else [[0, 1, 2]]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gptj", "cerebras"])
def test_parts_are_evicted_alike_alone_and_in_a_batch(name) -> None:
    config = KeyformerConfig(kv_budget=4, seed=1)
    model = enable_keyformer(small_stock(name), config)
    parts = [[*map(Part, text)] for text in TEXTS]
    cache, together = read(model, parts, config, [7, 8, 9], 5)
    assert cache.layers[0].positions.shape[-1] == 4
    for number, text in enumerate(parts):
        _, alone = read(model, [text], config, [7 + number], 5)
        assert_close(together[number], alone[0])
    _, other = read(model, parts, KeyformerConfig(kv_budget=4, seed=2), [7, 8, 9], 5)
    assert not torch.allclose(together, other)


def measured(kind, path, items, config, **more):
    of = kind(str(path), "float32", "summarization", items, 2, 1, 6, **more)
    return of(config, CPU, range(len(items)))


def test_measures_of_a_full_cache(model_path, articles) -> None:
    """The reference's likelihood is stock's; the full cache agrees with itself."""
    items = load_items(articles, TASKS["summarization"])
    model, tokenizer = load_model(model_path, dtype="float32", device="cpu")
    found = measured(Reference, model_path, items, FULL)
    for item, of in zip(items, found, strict=True):
        prompt = tokenizer(TASKS["summarization"].prompt(item))["input_ids"]
        written = tokenizer(item["output"], add_special_tokens=False)["input_ids"][:6]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written]), use_cache=False).logits
        lost = torch.nn.functional.cross_entropy(
            logits[0, len(prompt) - 1 : -1], torch.tensor(written)
        )
        assert of["nll"] == pytest.approx(float(lost), abs=1e-4)
    with pytest.raises(InputError, match="item 1 of summarization has an empty reference"):
        measured(Reference, model_path, [items[0], {**items[1], "output": ""}], FULL)
    assert measured(Agreement, model_path, items, FULL) == [{"agreement": 100.0}] * len(items)
    small = KeyformerConfig.preset("window", kv_cache=10)
    evicted = measured(Agreement, model_path, items, small)
    assert min(of["agreement"] for of in evicted) < 100


def test_answers_are_those_of_generate(model_path, articles) -> None:
    """The greedy text of the prompt decides; a text that is too long is one line."""
    model, tokenizer = load_model(model_path, dtype="float32", device="cpu")
    item = questions(load_articles(articles), "")[0]
    prompt = conversation(item["messages"], tokenizer, "none").replace(CUT, "")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    text = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)[
        0, ids.shape[1] :
    ]
    right = {**item, "answer": tokenizer.decode(text, skip_special_tokens=True)}
    found = measured(Answered, model_path, [right, item], FULL, prompt_kind="none")
    assert [of["answered"] for of in found] == [100.0, 0.0]
    assert found[0]["answer_nll"] < found[1]["answer_nll"]
    ahead = questions(load_articles(articles), "Who?")[0] | {"answer": right["answer"]}
    assert measured(Answered, model_path, [ahead], FULL, prompt_kind="none") == [found[0]]


def test_differences_are_paired() -> None:
    """To the rows of the same size; the full cache has no size."""

    def row(method, size, values):
        cell = Cell({"method": method, "kv_cache": size}, FULL)
        return summarize(cell, [{"nll": values}])

    rows = [row("full", "", [1.0, 2.0, 3.0]), row("h2o", 50, [2.0, 3.0, 4.0])]
    rows.append(row("keyformer", 50, [2.5, 3.5, 4.5]))
    (found,) = with_differences({("m", "t"): rows}, ("full", "h2o")).values()
    assert math.isnan(found[0].values[f"nll{MINUS}h2o"][0])
    assert found[1].values[f"nll{MINUS}full"] == pytest.approx((1.0, 1.0, 1.0))
    assert found[2].values[f"nll{MINUS}h2o"] == pytest.approx((0.5, 0.5, 0.5))
    assert np.isclose(found[2].values["nll"][0], 3.5)


def study(name: str, model_path: Path, out: Path, *flags: str) -> list[dict[str, str]]:
    given = ["--model_path", str(model_path), "--out", str(out), "--device", "cpu", "--seeds", "0"]
    carry_out([script("paper", name).main([*given, "--max_new_tokens", "3", *flags])])
    with (out / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


ASKED = ["question", "needle", "later", "needle later", "ahead", "needle ahead", "chat"]


def test_retrieval_writes_a_record_and_the_needles_by_place(model_path, articles, tmp_path) -> None:
    flags = ["--articles", str(articles), "--lengths", "20", "25", "--depths", "0", "100"]
    flags += ["--needles", "1", "--methods", "h2o", "keyformer", "--sizes", "50"]
    flags += ["--n_obs", "2"]
    rows = study("retrieval", model_path, tmp_path / "out", *flags)
    assert [row["task"] for row in rows[::3]] == ASKED
    assert len(rows) == 21 and all(0 <= float(row["answered"]) <= 100 for row in rows)
    assert all((row["answered_minus_h2o"] == "") == (row["method"] == "full") for row in rows)
    record = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert record["items"] == dict.fromkeys(ASKED, 4) | {"chat": 2}
    with (tmp_path / "out" / "retrieval_needles.csv").open() as file:
        places = list(csv.DictReader(file))
    assert [row["task"] for row in places[::4]] == ["full", "h2o 50 %", "keyformer 50 %"]
    assert {(row["words"], row["depth"]) for row in places} == {
        (words, depth) for words in ("20", "25") for depth in ("0", "100")
    }
    assert (tmp_path / "out" / "retrieval_needles.svg").exists()


def test_summaries_by_all_measures(model_path, articles, tmp_path) -> None:
    flags = ["--dataset_path", str(articles), "--methods", "window", "--sizes", "50"]
    rows = study("summaries", model_path, tmp_path / "out", *flags)
    measures = ["rouge", "reference", "agreement", "continued"]
    assert [row["task"] for row in rows] == [name for name in measures for _ in range(2)]
    assert float(rows[4]["agreement"]) == 100 and rows[0]["rouge2"]
    assert rows[2]["nll"] and rows[6]["nll"] and rows[2]["nll"] != rows[6]["nll"]


def test_any_study_measures_the_reference(model_path, articles, tmp_path, capsys) -> None:
    flags = ["--dataset_path", str(articles), "--measure", "reference"]
    rows = study("key_set", model_path, tmp_path / "out", *flags)
    assert all(row["nll"] and "rouge2" not in row for row in rows)
    assert "(nats per token, mean of paired differences" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "key_set.json").read_text())
    assert record["measure"] == "reference"


def test_prompts_end_where_trained_positions_do() -> None:
    """Of rotations, which would go on; a table's end is the nearer one."""
    model = enable_keyformer(small_model("llama", max_position_embeddings=50), FULL)
    assert prompt_room(model, 20) is None
    assert trained_room(model, 20) == 31  # the last generated token is not fed back
    with pytest.raises(InputError, match=r"at most the 50 positions .* got 51"):
        trained_room(model, 51)
    table = enable_keyformer(small_model("gpt2"), FULL)
    assert trained_room(table, 20) == prompt_room(table, 20) is not None


@pytest.mark.parametrize(
    ("flags", "datasets", "says"),
    [
        (["--out", "x"], [], "error: the folder of results is RESULTS, not --out"),
        ([], ["none.json"], "error: DATASETS: there is no file none.json"),
        ([], ["a.json", "b/a.json"], "error: DATASETS must have different names"),
        ([], ["a.json"], None),
    ],
)
def test_the_real_models_script_keeps_datasets_apart(flags, datasets, says, tmp_path) -> None:
    """What it would run, each dataset with a folder of its own; or one line and exit code 2."""
    (tmp_path / "b").mkdir()
    for name in ("a.json", "b/a.json"):
        (tmp_path / name).write_text("[]")
    script = ROOT / "paper" / "smollm2.sh"
    results = {"RESULTS": str(tmp_path / "results"), "DATASETS": " ".join(datasets)}
    ran = subprocess.run(
        ["bash", str(script), "--bs", "3", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": "echo", **results},
        capture_output=True,
        text=True,
    )
    if says is not None:
        assert ran.returncode == 2 and says in ran.stderr and len(ran.stderr.splitlines()) == 1
        assert not ran.stdout
        return
    first, second = ran.stdout.splitlines()
    assert first.endswith(f"--out {tmp_path / 'results'} --bs 3")
    assert f"--dataset_path {tmp_path / 'a.json'} " in second
    assert second.endswith(f"--out {tmp_path / 'results' / 'a'} --bs 3")
