"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

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
