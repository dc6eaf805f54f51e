"""How much memory is alive. It is counted on tensors: a C library keeps more than is in use, a GPU does not."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Within it `peak` is the most bytes that were alive of what was made, beside the tensors that are `there`."""

    now = peak = 0

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.bytes_of = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.bytes_of:
                self.bytes_of[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def free(self, storage: int) -> None:
        self.now -= self.bytes_of.pop(storage)
