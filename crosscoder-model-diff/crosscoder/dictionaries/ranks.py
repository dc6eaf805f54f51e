"""The processes that train one dictionary together (torchrun), and what they tell each other.

Every process reads its own rows of each batch. What depends on the whole batch (which latents are selected, the
variance of the residual, which latents are alive) is exchanged, so that several processes compute what one would at the
same batch: by autograd each the gradients of its rows, in the step by hand each those of its latents. `ALONE` is the
one process of an ordinary run, for which all of it is the identity.
"""

from __future__ import annotations

import atexit
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finqa.runtime import parallel


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. Everything below but `rows` must be called by all of them at the same time."""

    rank: int = 0
    world: int = 1
    sent: Counter[str] = field(default_factory=Counter, compare=False)
    """Bytes and messages that this process has sent to all others."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This process's equal share of the rows of a batch."""
        n = len(batch) // self.world
        return batch[self.rank * n : (self.rank + 1) * n]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, elementwise; without gradient."""
        return self._reduced(tensor, "SUM")

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all processes, elementwise; without gradient."""
        return tensor if self.world == 1 else self.sum(tensor) / self.world

    def smallest(self, tensor: Tensor) -> Tensor:
        """Minimum over all processes, elementwise."""
        return self._reduced(tensor, "MIN")

    def gather(self, tensor: Tensor) -> Tensor:
        """[world, ...]: the tensors of all processes, which are of one shape, in their order."""
        if self.world == 1:
            return tensor[None]
        everyone = tensor.new_empty(self.world * tensor.numel())
        self.begin_gather(tensor.flatten(), everyone).wait()
        return everyone.view(self.world, *tensor.shape)

    def begin_gather(self, own: Tensor, everyone: Tensor, counted: bool = True) -> Any:
        """Begin to put the tensors of all processes into `everyone`, one after the other along its first dimension;
        its `wait()` returns when they are there. `sent` has it where it is to be `counted`."""
        import torch.distributed as dist

        if counted:
            self._note(own)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        return gather(everyone, own.contiguous(), async_op=True)

    def begin_share_of_sum(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Begin to add up the tensors of all processes. Returns what takes this one's share of the sum, as many rows of
        it as `rows` gives, and whose `wait()` returns when it is there."""
        import torch.distributed as dist

        self._note(tensor)
        share = torch.empty_like(self.rows(tensor))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
        return share, scatter(share, tensor, async_op=True)

    def number_of_first(self, own: int, device: torch.device) -> int:
        """The first process's number. Waits for it."""
        if self.world == 1:
            return own
        number = torch.tensor(own, device=device)
        self.from_first(number)
        return int(number)

    def _note(self, tensor: Tensor) -> None:
        self.sent.update(bytes=tensor.nbytes, messages=1)

    def from_first(self, tensor: Tensor) -> None:
        """Put the first process's numbers in place of one's own."""
        if self.world > 1:
            import torch.distributed as dist

            dist.broadcast(tensor, 0)

    def begin_sum(self, tensor: Tensor) -> Any:
        """Begin to put the sum over all processes in the tensor's place; its `wait()` returns when it is there."""
        import torch.distributed as dist

        self._note(tensor)
        return dist.all_reduce(tensor, async_op=True)

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        self._note(tensor)
        out = tensor.detach().clone()
        dist.all_reduce(out, getattr(dist.ReduceOp, how))
        return out


ALONE = Ranks()


def ranks_from_environment(device: torch.device | str) -> Ranks:
    """The processes that torchrun started; `ALONE` where it did not. gloo on the CPU, nccl on GPUs.

    `device` is this process's own, which it computes on from now on.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    import torch.distributed as dist

    if not dist.is_initialized():
        parallel.loaded_before_joining()
        device = torch.device(device)
        bound = device if device.type == "cuda" else None
        if bound:
            torch.cuda.set_device(bound)
        dist.init_process_group("nccl" if bound else "gloo", timeout=parallel.PATIENCE, device_id=bound)
        atexit.register(dist.destroy_process_group)  # its threads, still there at the end, would abort the process
    return Ranks(dist.get_rank(), dist.get_world_size())
