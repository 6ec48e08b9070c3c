"""The Python of README and of the researcher's guide runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from families import small_model
from originals import write_tokenizer
from peft import LoraConfig, get_peft_model

ROOT = Path(__file__).parents[1]


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys) -> None:
    """With a small model of the same family in the place of the one on the hub."""
    model = small_model("qwen3", vocab_size=320, max_position_embeddings=1024)
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", "cerebras", 320)
    get_peft_model(model, LoraConfig()).save_pretrained(tmp_path / "adapter")
    text = (ROOT / "README.md").read_text()
    for name, folder in (("Qwen/Qwen3-0.6B", "model"), ("your/adapter", "adapter")):
        assert name in text
        text = text.replace(name, str(tmp_path / folder))
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "bridge" in capsys.readouterr().out


def test_the_guides_rule_and_policy_run(monkeypatch) -> None:
    """On the bundled model: what the rule keeps of the prompt, and the policy's slots."""
    text = (ROOT / "models" / "README.md").read_text()
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "models/README.md", "exec"), names)
    read = names["prompt"]["input_ids"].shape[1]
    k = int(read * 0.3)
    w = int(k * 0.3)
    kept = names["kept"].tolist()
    assert len(kept) == k and kept[-w:] == list(range(read + 9 - w, read + 9))
    assert min(kept) < read - w  # key tokens of the prompt, too
    slots = names["slots"]
    assert slots[0] == w + (k - w) // 2 and slots == sorted(slots) and slots[-1] > k
