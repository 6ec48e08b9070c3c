"""The wheel: what it holds, and that it is all that a model needs, away from the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import Forked

from keyformer import InputError
from keyformer_lm_eval import harness

ROOT = Path(__file__).parents[1]
PACKAGES = {
    *("keyformer", "keyformer_evaluation", "keyformer_lm_eval"),
    *(f"{name}_keyformer" for name in ("mpt", "gptj", "cerebras", "bloom", "falcon")),
}
PROGRAM = """
import os
import sys

os.chdir({folder!r})
sys.path[:] = [{folder!r}, *(path for path in sys.path if {root!r} not in path)]
for name in [name for name in sys.modules if "keyformer" in name.split(".")[0]]:
    del sys.modules[name]

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import keyformer
import keyformer_lm_eval.harness
from keyformer import KeyformerConfig, enable_keyformer, load_model
from keyformer_evaluation.records.identity import _project

config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=61, max_position_embeddings=256,
)
LlamaForCausalLM(config).save_pretrained("model")
model = enable_keyformer(LlamaForCausalLM.from_pretrained("model"), KeyformerConfig(kv_cache=50))
prompt = torch.arange(1, 31)[None]
output = model.generate(
    prompt, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True
)
print(keyformer.__file__)
print(*output.sequences.shape, output.past_key_values.layers[0].positions.shape[-1])
print(*sorted(_project()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, as setuptools leaves a folder in what it builds from."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE.txt"):
        shutil.copy(ROOT / name, source)
    for file in (ROOT / "models").glob("*/**/*"):
        if file.suffix in {".py", ".yaml", ".txt"} and file.is_file():
            copy = source / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_their_files(wheel) -> None:
    names = [name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == PACKAGES
    expected = [
        str(file.relative_to(ROOT / "models"))
        for package in PACKAGES
        for file in (ROOT / "models" / package).rglob("*")
        if file.is_file() and file.suffix not in {".pyc", ".sh"}
    ]
    assert sorted(names) == sorted(expected)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name == f"keyformer-{version}-py3-none-any.whl"


def test_the_wheel_is_enough_away_from_the_checkout(wheel, tmp_path) -> None:
    """It generates with half of the cache, and knows its own packages from the others there."""
    installed = tmp_path / "installed"
    ZipFile(wheel).extractall(installed)
    (installed / "another").mkdir()
    (installed / "another" / "__init__.py").touch()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(folder=str(installed), root=str(ROOT)))
    code, out, err = Forked([str(program)], tmp_path / "run").wait()
    assert code == 0, err
    at, shape, project = out.splitlines()[-3:]
    assert at == str(installed / "keyformer" / "__init__.py")
    assert shape == "1 38 15"
    assert set(project.split()) == PACKAGES


def test_tasks_of_the_checkout_are_missed_in_one_line(tmp_path, monkeypatch) -> None:
    read = harness._known.__wrapped__
    monkeypatch.setattr(harness, "TASKS", tmp_path / "tasks")
    monkeypatch.setattr(harness, "_known", lambda its_own: read(False))  # lm-eval's take seconds
    with pytest.raises(InputError, match=f"no task 'tiny'.*no folder {tmp_path / 'tasks'}$"):
        harness.find_tasks(["tiny"])
