"""paper/article.py: what its pictures say of a cache is what a cache of the same steps holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import script
from PIL import Image

from keyformer import InputError, load_model

article = script("paper", "article")
MODEL = "mpt-tiny-keyformer"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def walked():
    model, tokenizer = load_model(f"models/{MODEL}", device="cpu", dtype="float32")
    return article.walk(model, tokenizer, layer=1, head=0)


def test_every_picture_is_drawn(tmp_path) -> None:
    """With the bundled model; the animation has a frame for the prompt and each step."""
    flags = ["--model_name", MODEL, "--device", "cpu", "--layer", "1", "--head", "0"]
    article.main([*flags, "--out", str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"growth.png", "key_tokens.png", "walk.png", "noise.png", "walk.gif"}
    assert names == pictures | {"walk.json"}
    with Image.open(tmp_path / "walk.gif") as animation:
        assert animation.n_frames == article.WALKED + 1


def test_a_walk_keeps_its_slots(walked) -> None:
    """As many tokens as slots after each step, the youngest among them; who left stays away."""
    assert walked.held.shape == (article.WALKED + 1, article.SLOTS)
    gone: set[int] = set()
    for step, held in enumerate(walked.held.tolist()):
        read = walked.prompt + step
        assert len(set(held)) == article.SLOTS and not gone & set(held)
        assert set(range(read - walked.window, read)) <= set(held)
        states = [walked.state(token, step) for token in range(len(walked.tokens))]
        assert states.count("evicted") == read - article.SLOTS
        assert states.count("just read") == (step > 0)
        assert states.count("key token") == article.SLOTS - walked.window
        gone |= set(range(read)) - set(held)


def test_the_article_tells_the_walk_that_is_drawn() -> None:
    """Who has left the window and beaten whom, at which step."""
    text = " ".join((ROOT / "blog" / "README.md").read_text().split())
    said = re.search(r"At step (\d+) \*(\w+)\* has left the window and beaten \*(\w+)\*", text)
    assert said is not None
    step, winner, loser = int(said[1]), said[2], said[3]
    walk = json.loads((ROOT / "blog" / "figures" / "walk.json").read_text())["walk"]
    before, after = (set(walk["held"][at]) for at in (step - 1, step))
    left = walk["prompt"] + step - 1 - article.SLOTS * article.RECENT // 100
    assert walk["tokens"][left] == winner and left in after
    assert [walk["tokens"][token] for token in before - after] == [loser]


def test_shares_are_those_of_layers_and_heads() -> None:
    """They add up to the budget, and all keep the recent window."""
    model, tokenizer = load_model(f"models/{MODEL}", device="cpu", dtype="float32")
    tokens, share, config = article.kept_by(model, tokenizer, "The bridge is closed. " * 20)
    budget = config.budget(len(tokens))
    assert np.isclose(share.sum(), budget)
    assert (share[-config.recent_window(budget) :] == 1).all()


@pytest.mark.parametrize("flags", [["--layer", "99"], ["--layer", "0", "--head", "99"]])
def test_a_layer_or_head_that_is_not_there(flags, tmp_path) -> None:
    with pytest.raises(InputError, match=f"{flags[-2]} must be at most"):
        article.main(["--model_name", MODEL, "--device", "cpu", "--out", str(tmp_path), *flags])
    assert not any(tmp_path.iterdir())
