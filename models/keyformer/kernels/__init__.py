"""Triton versions of the hot loops: they take arrays, and know nothing of caches or rules."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the numbers that they compute with."""

COUNTS = 3
"""What the decode kernel's programs count of each head: those done, settlers done, and those that
had their turn."""
