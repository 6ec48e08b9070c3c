"""Where a cache's work is done: by torch, or by the Triton kernels.

Each backend has ``prefill``, attention of new tokens to the slots and to each other with what the
rules ask for, and ``reorder``, beams that change parents. The kernels also have ``step``: all that
happens in a layer when one new token comes.
"""

from keyformer.backends.choice import on_kernels, prefill, reorder, steps

__all__ = ["on_kernels", "prefill", "reorder", "steps"]
