"""Small models and checkpoints that the tests share."""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; test_downloads has a hub of its own
os.environ["OMP_NUM_THREADS"] = "1"  # of scripts too: there is a test for each core
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
import torch.utils.collect_env

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read on import: kernels run on the CPU, as numpy

import pytest
from families import small_model
from interpreter import make_quick
from originals import ORIGINALS
from torch.distributed import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from keyformer import KeyformerConfig, enable_keyformer
from keyformer_evaluation.tasks import flags

if "TRITON_INTERPRET" in os.environ:
    make_quick()
torch.utils.collect_env.get_pretty_env_info = str  # lm-eval asks pip, with each result
for absent in (torch.cuda, torch.xpu, torch.mtia):
    if not absent.is_available():
        # It would note each seed with the stack, for the day that the device is there.
        absent.manual_seed_all = lambda seed: None


def script(folder: str, name: str):
    """A script of a task folder as a module."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def zygote() -> Callable[[dict[str, Any]], Any]:
    """Asks the process that scripts are forked from, see zygote.py; started once."""
    path = str(Path(__file__).with_name("zygote.py"))
    process = subprocess.Popen(
        [sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout
    atexit.register(asked.close)

    def ask(request: dict[str, Any]) -> Any:
        print(json.dumps(request), file=asked, flush=True)
        return json.loads(answers.readline())

    return ask


class Forked:
    """A script in a process of its own, as from a terminal, but torch is there already.

    Parameters
    ----------
    command
        The script's path and its arguments.
    folder
        Where what it prints goes, to files or pipes that may be there already.
    stdin
        What it reads.
    environment
        More variables.

    Attributes
    ----------
    pid
        Of the process.
    """

    def __init__(
        self, command: list[str], folder: Path, stdin: bytes = b"", **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stdin").write_bytes(stdin)
        self._folder = folder
        self._code: int | None = None
        request = {"command": command, "folder": str(folder), "environment": environment}
        self.pid: int = zygote()(request)

    def poll(self, block: bool = False) -> int | None:
        """The exit code, that of a signal negative; None while it runs."""
        if self._code is None:
            self._code = zygote()({"pid": self.pid, "block": block})
        return self._code

    def wait(self) -> tuple[int, str, str]:
        """The exit code once it has ended, and what it printed to stdout and stderr."""
        code = self.poll(block=True)
        assert code is not None
        out, err = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        return code, out, err


def forked_ranks(command: list[str], folder: Path, count: int) -> list[tuple[int, str, str]]:
    """How a script ends in as many processes as accelerate's launcher would start.

    They have its environment, and meet, as under the launcher, at a store of who starts them: its
    port is one that nobody else has taken in the meantime.
    """
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.port), "GROUP_RANK": "0"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_WORLD_SIZE": "1"}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [
        Forked(command, folder / f"rank{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(count)
    ]
    return [rank.wait() for rank in ranks]


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the most elements of a tensor that one gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def pytest_collection_finish() -> None:
    """What is imported stays, so collecting garbage need not look at it: that is a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=ORIGINALS)
def arch(request) -> str:
    """Each of the paper's models: what takes it, or ``stock``, runs for all of them."""
    return request.param


def small_stock(arch: str, layers: int = 2, heads: int = 4, **changes: int) -> PreTrainedModel:
    """transformers' own model with random weights, large enough for logits to differ."""
    torch.manual_seed(0)
    original = ORIGINALS[arch]
    names = dict(zip(("d", "heads", "layers", "vocab"), original.small, strict=False))
    config = original.config(
        **{
            **original.small,
            names["layers"]: layers,
            names["heads"]: heads,
            names["vocab"]: 61,
            "use_cache": True,
            "initializer_range": 0.4,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "attn_implementation": "eager",
            **changes,
        }
    )
    dropout = {name: 0.0 for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}
    config.update({name: value for name, value in dropout.items() if hasattr(config, name)})
    return original.model(config).eval()


def small(name: str, **changes: Any) -> PreTrainedModel:
    """transformers' own model, small and random: one of the paper's, or of a family's."""
    return (small_stock if name in ORIGINALS else small_model)(name, **changes)


@functools.cache
def kept(name: str) -> PreTrainedModel:
    """:func:`small`, made once; by name, as tests name their models in lists of their own."""
    return small(name)


@pytest.fixture(scope="session")
def stock(arch) -> PreTrainedModel:
    """transformers' own model, small and random."""
    return small_stock(arch)


@pytest.fixture
def evicting(stock):
    """A function from a configuration to a copy of the stock model that evicts by it."""
    return lambda config=None: enable_keyformer(copy.deepcopy(stock), config)


@pytest.fixture
def full() -> KeyformerConfig:
    return KeyformerConfig.preset("full")


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """A left-padded batch of prompts of 13, 24 and 21 tokens."""
    torch.manual_seed(1)
    input_ids = torch.randint(1, 61, (3, 24))
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((11, 0, 3)):
        attention_mask[row, :padding] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


@pytest.fixture(autouse=True)
def store_of_its_own(monkeypatch, tmp_path_factory):
    """Every command of a test computes anew unless it names a --store; none writes into out/."""
    given = flags.store_flags

    def store_flags(parser, store) -> None:
        given(parser, store and tmp_path_factory.mktemp("store") / "finished.sqlite")

    monkeypatch.setattr(flags, "store_flags", store_flags)
