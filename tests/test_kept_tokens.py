"""paper/kept_tokens.py: its page in a browser, against a cache that takes the same steps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from browser import Page, browser
from conftest import script
from originals import write_original

from keyformer import InputError, KeyformerCache, KeyformerConfig, load_model
from keyformer_evaluation.studies.study import BUNDLED
from keyformer_evaluation.tasks.data import TASKS, load_items

kept_tokens = script("paper", "kept_tokens")
STEPS = 6


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("kept") / "mpt", "mpt", "safetensors")


@pytest.fixture(scope="module")
def page(model_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "page.html"
    flags = ["--model_path", str(model_path), "--device", "cpu", "--attention", "h2o"]
    flags += ["--kv_budget", "40", "--item", "1", "--max_new_tokens", str(STEPS + 1)]
    kept_tokens.main([*flags, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def chromium():
    with browser() as page:
        yield page


@pytest.fixture
def opened(chromium, page) -> Page:
    chromium.open(page.as_uri())
    return chromium


def states(model_path: Path) -> list[torch.Tensor]:
    """After the prompt and each step, the positions that the cache holds, by layer."""
    model, tokenizer = load_model(model_path, device="cpu", dtype="float32")
    item = load_items(BUNDLED["summarization"], TASKS["summarization"])[1]
    ids = tokenizer(TASKS["summarization"].prompt(item), return_tensors="pt")["input_ids"]
    cache = KeyformerCache(model.config, KeyformerConfig.preset("h2o", kv_budget=40))
    found = []
    with torch.no_grad():
        for _ in range(STEPS + 1):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(torch.stack([layer.positions[0] for layer in cache.layers]))
    return found


def shading(page: Page) -> dict[int, int]:
    """By token, how many heads the page says hold it; its colour has to agree."""
    read = """[...document.querySelectorAll("span[data-token]")].map((span) =>
        [+span.dataset.token, +span.dataset.held, getComputedStyle(span).backgroundColor])"""
    held = {}
    for token, holding, color in page.evaluate(read):
        assert (color == "rgba(0, 0, 0, 0)" or color.endswith(", 0)")) == (holding == 0), color
        held[token] = holding
    return held


def counted(positions: torch.Tensor) -> dict[int, int]:
    tokens, counts = positions.unique(return_counts=True)
    return dict(zip(tokens.tolist(), counts.tolist(), strict=True))


def test_slider_changes_the_shading(opened, model_path) -> None:
    """At every step, shading is what the cache held then."""
    seen = []
    for step, positions in enumerate(states(model_path)):
        assert opened.text("#at") == f"{step} of {STEPS}"
        held = shading(opened)
        assert {token: count for token, count in held.items() if count} == counted(positions)
        seen.append(held)
        opened.press_right("#step")
    assert all(before != after for before, after in pairwise(seen))
    assert opened.text("#counts").startswith("40 of ")


def test_one_layer_and_head(opened, model_path) -> None:
    opened.choose("#layer", "1")
    opened.choose("#head", "2")
    held = {token for token, count in shading(opened).items() if count}
    assert held == set(states(model_path)[0][1, 2].tolist())


def test_hover_shows_the_score(opened, model_path) -> None:
    opened.choose("#layer", "0")
    opened.choose("#head", "0")
    token = '#prompt span[data-held="1"]'
    opened.hover(token)
    tip = opened.text("#tip")
    position = int(opened.evaluate(f"document.querySelector('{token}').dataset.token"))
    assert f"position {position}\nheld by 1 of 1 heads" in tip

    model, tokenizer = load_model(model_path, device="cpu", dtype="float32")
    item = load_items(BUNDLED["summarization"], TASKS["summarization"])[1]
    ids = tokenizer(TASKS["summarization"].prompt(item), return_tensors="pt")["input_ids"]
    cache = KeyformerCache(model.config, KeyformerConfig.preset("h2o", kv_budget=40))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    slot = cache.layers[0].positions[0, 0].tolist().index(position)
    shown = float(tip.rpartition("score ")[2])
    assert shown == pytest.approx(float(cache.layers[0].scores[0, 0, slot]), rel=2e-2)


def test_page_needs_no_network_and_has_no_errors(opened) -> None:
    said = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert not [event for event in opened.events if event[0] in said]
    asked = [event for method, event in opened.events if method == "Network.requestWillBeSent"]
    urls = [event["request"]["url"] for event in asked]
    assert urls and all(url.startswith("file:") for url in urls), urls


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--item", "200"], "--item must be from 0 to 199"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--kv_cache", "0"], "kv_cache"),
        (["--dataset_path", "nowhere.json"], r"nowhere\.json"),
    ],
)
def test_bad_input_is_named(flags, says, model_path, tmp_path) -> None:
    out = tmp_path / "page.html"
    with pytest.raises(InputError, match=says):
        kept_tokens.main(["--model_path", str(model_path), "--out", str(out), *flags])
    assert not out.exists()
