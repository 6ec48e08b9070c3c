"""transformers imports torchao wherever it is installed; what is said of that waits for its use.

Imported before anything of transformers. torchao warns of its kernels that this machine cannot
load, and torch of how torchao is written: of interest to who quantizes with it, and no one else.
"""

from __future__ import annotations

import importlib
import logging

_held: list[logging.LogRecord] = []


def _hold(record: logging.LogRecord) -> bool:
    _held.append(record)
    return False


def say() -> None:
    """Log what was said while torchao was imported; once."""
    while _held:
        record = _held.pop(0)
        logging.getLogger(record.name).handle(record)


_loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
for _logger in _loggers:
    _logger.addFilter(_hold)
try:
    importlib.import_module("transformers.quantizers")
finally:
    for _logger in _loggers:
        _logger.removeFilter(_hold)
