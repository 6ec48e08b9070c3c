"""The documents: their Python runs as it stands, their links lead somewhere, README is short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from families import small_model
from originals import write_tokenizer
from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).parents[1]


def documents() -> list[Path]:
    """Every Markdown file of the repository, but for what is hidden or built."""
    found = ((path, path.relative_to(ROOT).parts) for path in ROOT.rglob("*.md"))
    return [path for path, at in found if at[0] != "build" and not any(p[0] == "." for p in at)]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    """A small model of the same family, and an adapter, in the place of those on the hub."""
    folder = tmp_path_factory.mktemp("readme")
    model = small_model("qwen3", vocab_size=320, max_position_embeddings=32768)
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model", "cerebras", 320)
    get_peft_model(model, LoraConfig()).save_pretrained(folder / "adapter")
    return {"Qwen/Qwen3-0.6B": str(folder / "model"), "your/adapter": str(folder / "adapter")}


def run_blocks(document: str, stand_ins: dict[str, str]) -> dict[str, Any]:
    """Run a document's Python in order, and return its names."""
    text = (ROOT / document).read_text()
    for name, path in stand_ins.items():
        text = text.replace(name, path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, document, "exec"), names)
    return names


def test_readmes_example_evicts(stand_ins, monkeypatch, capsys) -> None:
    """Half of its prompt."""
    monkeypatch.chdir(ROOT)
    names = run_blocks("README.md", {**stand_ins, "max_new_tokens=64": "max_new_tokens=8"})
    read = names["inputs"]["input_ids"].shape[1]
    assert names["output"].shape[1] > read
    assert capsys.readouterr().out.strip()
    again = names["model"].generate(
        **names["inputs"], max_new_tokens=2, return_dict_in_generate=True
    )
    assert again.past_key_values.layers[0].positions.shape[-1] == read // 2


def test_the_guides_python_runs(stand_ins, monkeypatch) -> None:
    """What its rule keeps of the bundled model's prompt, and its policy's slots."""
    monkeypatch.chdir(ROOT)
    names = run_blocks("models/README.md", stand_ins)
    read = names["prompt"]["input_ids"].shape[1]
    k = int(read * 0.3)
    w = int(k * 0.3)
    kept = names["kept"].tolist()
    assert len(kept) == k and kept[-w:] == list(range(read + 9 - w, read + 9))
    assert min(kept) < read - w  # key tokens of the prompt, too
    slots = names["slots"]
    assert slots[0] == w + (k - w) // 2 and slots == sorted(slots) and slots[-1] > k


def test_links_lead_somewhere() -> None:
    """To a file of the repository, and to a heading in it."""
    broken = []
    for document in documents():
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = link.partition("#")
            if path.startswith(("http:", "https:")):
                continue
            target = (document.parent / path).resolve() if path else document
            if not target.exists() or (heading and heading not in headings(target)):
                broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert not broken


def headings(document: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    lines = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_readme_is_short() -> None:
    """A screen or two: what is more goes to the folder that it is about."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
