"""load_model on a .gguf file."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import CHAT_TEMPLATE, write_gguf
from transformers import PreTrainedModel

from keyformer import InputError, KeyformerCache, KeyformerConfig, disable_keyformer, load_model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    """A file, and transformers' model of what is in it."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return file, write_gguf(file)


def test_gguf_computes_what_the_stock_model_does(written, tmp_path) -> None:
    """Also in a folder with another model's files, of which none is read."""
    file, stock = written
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("not JSON")
    shutil.copy(file, tmp_path)
    config = KeyformerConfig.preset("full")
    model, tokenizer = load_model(tmp_path / file.name, config, device="cpu")
    inputs = torch.randint(3, 320, (2, 24))
    with torch.no_grad():
        assert torch.allclose(model(inputs).logits, stock(inputs).logits, atol=1e-5)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.decode(tokenizer("the key")["input_ids"]) == "the key"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert model.generation_config.eos_token_id == 2  # the end of a turn ends a text
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = torch.tensor(tokenizer("<|im_start|>the recent tokens")["input_ids"])[None]
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


def test_gguf_evicts_and_is_saved_like_any_model(written, tmp_path) -> None:
    file, _ = written
    settings = KeyformerConfig(kv_budget=6, seed=0)
    model, tokenizer = load_model(str(file), settings, device="cpu", dtype="bfloat16")
    ids, cache = torch.randint(3, 320, (1, 24)), KeyformerCache(model.config, settings)
    options = {"max_new_tokens": 5, "do_sample": False}
    text = model.generate(ids, past_key_values=cache, **options)
    assert [layer.positions.shape[-1] for layer in cache.layers] == [6, 6]
    for saved in (disable_keyformer(model), tokenizer):
        saved.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    again, _ = load_model(tmp_path / "saved", settings, device="cpu")
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.generate(ids, **options), text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (lambda whole: whole[: len(whole) - 1000], "x.gguf is cut off or no GGUF file"),
        (lambda whole: whole[:3000], "x.gguf is cut off or no GGUF file"),
        (lambda whole: whole[:2], "x.gguf is cut off or no GGUF file"),
        (lambda whole: b"GGML" + whole[4:], "x.gguf is cut off or no GGUF file"),
        (lambda whole: b"", "x.gguf is empty"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (lambda whole: whole.replace(b"llama", b"lamma"), "architecture lamma is not supported"),
        (lambda whole: whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"), "missing (1: model.layers"),
    ],
)
def test_broken_gguf_is_one_line(written, tmp_path, content, says: str) -> None:
    file = tmp_path / "x.gguf"
    if content:
        file.write_bytes(content(written[0].read_bytes()))
    with pytest.raises(InputError) as error:
        load_model(file, device="cpu")
    line = str(error.value)
    assert line.startswith(f"cannot load a model from {file}: ") and says in line
    assert "\n" not in line


def test_gguf_needs_its_package_and_no_quantization(written, monkeypatch) -> None:
    with pytest.raises(InputError, match=r"quantize must be None for a .gguf file, got 'int8'"):
        load_model(written[0], device="cpu", quantize="int8")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    with pytest.raises(InputError, match=r'needs gguf, which is not installed.*extra "smollm2"'):
        load_model(written[0], device="cpu")
