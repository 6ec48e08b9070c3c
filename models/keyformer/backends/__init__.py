"""Where a cache's work is done: by torch, or by the Triton kernels.

Each backend has ``prefill``, attention of new tokens to the slots and to each other with what the
rules ask for; ``step``, all that happens in a layer when one new token comes; and ``reorder``,
beams that change parents.
"""

from keyformer.backends.choice import on_kernels, prefill, reorder, stepping

__all__ = ["on_kernels", "prefill", "reorder", "stepping"]
