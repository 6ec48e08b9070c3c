"""Small models and checkpoints that the tests share."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; test_downloads has a hub of its own
os.environ["OMP_NUM_THREADS"] = "1"  # of scripts too: there is a test for each core
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read on import: kernels run on the CPU, as numpy

import pytest
from accelerate import PartialState
from families import small_model
from originals import ORIGINALS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from keyformer import KeyformerConfig, enable_keyformer
from keyformer.evaluation import flags


def script(folder: str, name: str):
    """A script of a task folder as a module."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Forked:
    """A script in a process of its own, as from a terminal; forked, so that torch is there.

    Attributes
    ----------
    pid
        Of the process.
    """

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._said = [folder / "stdout", folder / "stderr"]
        for file in self._said:
            file.touch()
        self._code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._run(command, environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> NoReturn:
        code: Any = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(environment)
            for number, file in enumerate(self._said, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            PartialState._reset_state()
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def poll(self) -> int | None:
        """The exit code, that of a signal negative; None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> tuple[int, str, str]:
        """The exit code once it has ended, and what it printed to stdout and stderr."""
        code = self._look(0)
        assert code is not None
        out, err = (file.read_text() for file in self._said)
        return code, out, err

    def _look(self, how: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, how)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def forked_ranks(command: list[str], folder: Path, count: int) -> list[Forked]:
    """A script in as many processes as accelerate's launcher would start, with its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0"}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "GROUP_WORLD_SIZE": "1"}
    return [
        Forked(command, folder / f"rank{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(count)
    ]


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the most elements of a tensor that one gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


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
