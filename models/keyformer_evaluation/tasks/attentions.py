"""Saving attention weights together with the positions they belong to."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from torch import Tensor

from keyformer.attention import Attended
from keyformer_evaluation.records.results import check_replaceable, check_writable, write_whole


def check_attentions(folder: Path) -> None:
    """Make sure that weights can be written to a folder, and replace none but weights.

    Raises
    ------
    InputError
        If it cannot be made or written to, or holds other arrays under the names to be.
    """
    check_writable(folder, folder=True)
    for path in folder.glob("[0-9]*.npz"):
        try:
            with np.load(path, allow_pickle=False) as saved:
                ours = all(name.startswith("step") for name in saved.files)
        except (OSError, ValueError, zipfile.BadZipFile):
            ours = False
        check_replaceable(path, ours)


class AttentionRecorder:
    """An observer of a KeyformerCache that keeps what its layers attended to.

    Parameters
    ----------
    prompt, decode
        Whether to keep the prompt's weights (quadratic in its length) and those of the
        decode steps.

    Attributes
    ----------
    arrays
        By name, ``step{t}_layer{i}_`` followed by

        - ``weights``: float32, (batch, heads, queries, tokens), rows of the plain softmax;
        - ``positions``: int64, (batch, kv_heads, tokens), -1 for an empty slot;
        - ``query_positions``: int64, (batch, queries).

        Step 0 is the prompt; with beams, batch counts batch x beams.
    """

    def __init__(self, *, prompt: bool, decode: bool) -> None:
        self.prompt, self.decode = prompt, decode
        self.arrays: dict[str, np.ndarray] = {}
        self._steps: dict[int, int] = {}

    def __call__(self, layer: int, query_positions: Tensor, attended: Attended) -> None:
        """Keep one layer's attention at its next step."""
        step = self._steps.get(layer, -1) + 1
        self._steps[layer] = step
        if not (self.decode if step else self.prompt) or attended.weights is None:
            return
        name = f"step{step:04d}_layer{layer:02d}_"
        self.arrays[name + "weights"] = attended.weights.cpu().numpy()
        self.arrays[name + "positions"] = attended.positions.cpu().numpy()
        self.arrays[name + "query_positions"] = query_positions.cpu().numpy()

    def save(self, path: str | Path) -> None:
        """Write the arrays as one .npz; numbers only, so nothing is pickled."""
        write_whole(path, lambda file: np.savez(file, **self.arrays))  # type: ignore[arg-type]
