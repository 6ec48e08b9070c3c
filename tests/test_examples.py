"""examples/: each script as it runs, with a small random model, and the notebook's cells."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import script
from families import small_model
from originals import write_tokenizer

from keyformer import InputError

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch) -> Iterator[None]:
    """They import shared.py, as scripts do that lie beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    sys.modules.pop("shared", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("examples") / "qwen3"
    small_model("qwen3", vocab_size=320, max_position_embeddings=4096).save_pretrained(folder)
    write_tokenizer(folder, "cerebras", 320)
    return str(folder)


def run(name: str, model: str, capsys) -> list[str]:
    """The lines that an example prints."""
    script("examples", name).main(["--model", model])
    return capsys.readouterr().out.splitlines()


def numbers(line: str) -> list[int]:
    """The whole numbers at the beginning of a line, before its texts."""
    return [int(number.replace(",", "")) for number in re.findall(r"\b\d[\d,]*", line)]


def test_own_model_keeps_a_fifth(model, capsys) -> None:
    everything, fifth = run("own_model", model, capsys)
    tokens, whole = numbers(everything)[:2]
    assert numbers(fifth)[0] == tokens
    # 23 of 24 new tokens are fed; slots that evict have scores, too.
    assert 0.18 < numbers(fifth)[1] / whole * (tokens + 23) / tokens < 0.25


def test_own_rule_prints_what_each_layer_keeps(model, capsys) -> None:
    lines = run("own_rule", model, capsys)
    assert [line.split(":")[0].split(" keeps")[0] for line in lines] == ["layer 0", "layer 1"]
    for line in lines:
        _, kept, of = numbers(line)[:3]
        assert kept == int((of - 8) * 0.2)


def test_endless_chat_never_grows(model, capsys) -> None:
    lines = run("endless_chat", model, capsys)
    seen, sizes = zip(*(numbers(line)[:2] for line in lines), strict=True)
    assert len(lines) == 16 and list(seen) == sorted(set(seen))
    full = next(turn for turn, tokens in enumerate(seen) if tokens > 128)
    assert seen[-1] > 4 * 128 and len(set(sizes[full:])) == 1


def test_quantized_is_smaller(model, capsys) -> None:
    plain, quantized = run("quantized", model, capsys)
    (weights, cache), (fewer, less) = (
        map(int, re.findall(r"\b\d+", line.split(": ")[1].replace(",", "")))
        for line in (plain, quantized)
    )
    assert fewer < weights and less < cache / 2


def test_several_gpus_says_where_layers_are(model, capsys) -> None:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    (line,) = run("several_gpus", model, capsys)
    assert line.startswith("caches of 2 layers: ") and device in line


@pytest.mark.parametrize(
    "name", ["own_model", "own_rule", "endless_chat", "quantized", "several_gpus"]
)
def test_a_model_that_is_not_there_is_named(name) -> None:
    with pytest.raises(InputError, match="nowhere"):
        script("examples", name).main(["--model", "nowhere"])


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    for file in EXAMPLES.iterdir():
        if file.suffix in {".py", ".ipynb"}:
            assert f"[{file.name}]({file.name})" in table
        if file.suffix == ".py":
            assert len(file.read_text().splitlines()) <= 40


def test_the_notebook_draws_what_is_kept(model, monkeypatch) -> None:
    """Its cells in turn, on the small model; it is committed without outputs."""
    monkeypatch.setattr("shared.model_path", lambda *_: model)
    matplotlib.use("Agg")
    notebook = json.loads((EXAMPLES / "kept_tokens.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "kept_tokens.ipynb", "exec"), names)
        if cell is cells[0]:
            names["STEPS"] = 3
    layers, tokens = 2, names["prompt"].shape[1]
    for method, steps in names["states"].items():
        assert len(steps) == 4 and steps[0].shape == (layers, tokens + 3), method
        # k slots in each head, after the prompt and ever after.
        assert all(state.sum(dim=-1).round().eq(int(tokens * 0.2)).all() for state in steps), method
    assert len(matplotlib.pyplot.get_fignums()) == 2
    matplotlib.pyplot.close("all")
