"""Room for a checkpoint: what its file holds is what its model may take, and the memory must have that.

A library makes the model that a config describes before it looks at the weights. Two numbers in a config can ask for more than any
machine has, so whatever is made is counted as it is registered, and held against the file's header.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_parameter_registration_hook

from hf_purify.errors import ModelError, first_line
from hf_purify.weights import check_weights

# A tied matrix is stored once and made up to four times (T5: shared, encoder, decoder, head) before it is tied; the spare is for heads
# and small models, whose missing tensors are named when they are loaded.
COPIES, SPARE = 4, 2**24
SPARE_BUFFERS = 2**30  # values: masks and positions, which are not stored
SPARE_TENSORS = 20_000


@contextmanager
def bounded(folder: Path, source: str, spread: bool = False) -> Iterator[None]:
    """Refuse, while the block makes a model, one that is far larger than the weights in `folder`.

    Args:
        spread: the model is spread over the processes, of which each loads a share.

    Raises:
        ModelError: more values than the file holds, or a file that does not fit into the memory.
    """
    headers = check_weights(folder, source).values()
    held, tensors = sum(h.numel for h in headers), sum(len(h.tensors) for h in headers)
    check_memory(sum(h.total for h in headers), source, spread)
    thread, seen = threading.get_ident(), set[tuple[int, str]]()
    made = {"parameters": 0, "buffers": 0}
    limits = {"parameters": COPIES * held + SPARE, "buffers": COPIES * held + SPARE_BUFFERS}

    def count(kind: str, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread or (id(module), name) in seen:
            return
        seen.add((id(module), name))  # loading puts another tensor in its place
        made[kind] += tensor.numel()
        if made[kind] > limits[kind] or len(seen) > COPIES * tensors + SPARE_TENSORS:
            raise ModelError(
                f"the config of '{source}' describes a larger model than its weights hold: {sum(made.values()):,} values in {len(seen):,} tensors "
                f"and more ('{name}' of {type(module).__name__}: {list(tensor.shape)}), the weights hold {held:,} in {tensors:,}; they are not of "
                "one checkpoint"
            )

    with ExitStack() as stack:
        hook = register_module_parameter_registration_hook(lambda m, n, p: count("parameters", m, n, p))
        stack.callback(hook.remove)
        hook = register_module_buffer_registration_hook(lambda m, n, b: count("buffers", m, n, b))
        stack.callback(hook.remove)
        try:
            yield
        except RuntimeError as error:
            if "allocate" not in str(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            # a library that makes tensors before it registers them; what was asked for stands in the allocator's words
            raise ModelError(
                f"the config of '{source}' describes a larger model than the memory holds ({first_line(error)}); its weights hold "
                f"{held:,} values"
            ) from error


def check_memory(needed: int, source: str, spread: bool = False) -> None:
    """Refuse weights that the free memory cannot hold.

    Args:
        needed: bytes of the files.

    Raises:
        ModelError: says how much is free and how much is needed.
    """
    if spread:
        needed = needed * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // int(os.environ.get("WORLD_SIZE", 1))
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"the weights of '{source}' take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: use a machine with more, or "
            "spread the model over several (FSDP)"
        )
