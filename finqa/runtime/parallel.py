"""Several processes that train one student together, as `torchrun` or `accelerate launch` starts them.

Every process runs the same script. The first one (rank 0) checks, prints and writes; the others follow it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from finqa.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets for each process; a process that works alone must not see them."""
PATIENCE = timedelta(hours=12)
"""How long processes wait for one of them, which may be downloading a model. (Of itself NCCL gives up after ten
minutes.) One that dies is not waited for: the launcher stops the others."""


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return rank() == 0


def own_device(kind: str) -> str:
    """The device of this process: `cuda` becomes `cuda:<n>` where several processes share the machine's GPUs.

    Raises UserError where they are more than those, or `kind` names one GPU for all of them.
    """
    if world_size() == 1 or not kind.startswith("cuda"):
        return kind
    import torch

    there, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if here > there:
        raise UserError(f"{here} processes need as many GPUs, and {there} are here; give --nproc-per-node {there}")
    if here > 1 and kind != "cuda":
        raise UserError(f"--device {kind} is one GPU, and each of the {here} processes needs its own: --device cuda")
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def check_device(name: str | None) -> None:
    """Raises UserError where --device names none of this machine; None is the default one."""
    if name is None:
        return
    import torch

    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    there += ["mps"] if torch.backends.mps.is_available() else []
    if name not in there and f"{name}:0" not in there:
        raise UserError(f"--device {name} is none of this machine, which has {', '.join(there)}")


def multiplies_bf16(device: str) -> bool:
    """Whether a device has bf16 products; a CPU with AVX-512 BF16, AMX or Arm BF16, where they are twice as fast.

    On any other CPU torch has them too, in software, six times slower than those in fp32.
    """
    import torch

    return device != "cpu" or any("bf16" in name and there for name, there in torch.cpu.get_capabilities().items())


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block, then the others do; where it fails, the others end (see report_errors).

    So an error that every process would meet is reported once, and the others find what the first one has written.
    """
    if is_first():
        yield
        wait_for_all()
    else:
        wait_for_all()
        yield


def wait_for_all() -> None:
    """Returns when every process is here; raises RuntimeError where another is gone."""
    if world_size() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        return
    from accelerate import PartialState

    loaded_before_joining()
    device = torch.device(own_device("cuda" if torch.cuda.is_available() else "cpu"))
    bound = {"device_id": device} if device.type == "cuda" else {}  # else NCCL guesses it, and says so
    PartialState(cpu=not bound, timeout=PATIENCE, **bound).wait_for_everyone()


def check_shared(folder: Path, seen: str) -> None:
    """Raises UserError where not every process has `seen` the same in a folder, which the first one writes for all.

    So it is on two machines without a file system that they share.
    """
    if world_size() == 1:
        return
    import torch

    wait_for_all()
    everyone: list[str] = [""] * world_size()
    torch.distributed.all_gather_object(everyone, seen)
    if len(set(everyone)) > 1:
        told = ", ".join(f"process {number}: {what}" for number, what in enumerate(everyone))
        raise UserError(f"{folder} is not the same for all processes ({told}); put it where all machines see it, or "
                        "copy it to each (--data-dir)")  # fmt: skip


def loaded_before_joining() -> None:
    """Call this before a process group is made, so that it can be destroyed.

    The functions of torch.distributed.nn have the group of that moment as a default argument; where they are first
    imported later (by an optimizer), they keep it and its threads for ever, which can abort the process at its end.
    """
    import torch

    if torch.distributed.is_available():
        import torch.distributed.nn


def total(number: float) -> float:
    """The sum of a number over all processes, which all must ask for."""
    if world_size() == 1:
        return number
    import torch
    from accelerate import PartialState

    added = torch.tensor(number, dtype=torch.float64, device=PartialState().device)
    torch.distributed.all_reduce(added)
    return added.item()


def add_up(tensor: Tensor) -> None:
    """Put the sum over all processes, which all must ask for, in the tensor's place."""
    if world_size() > 1:
        import torch

        torch.distributed.all_reduce(tensor)


def from_first(tensor: Tensor) -> None:
    """Put the first process's numbers in the tensor's place."""
    if world_size() > 1:
        import torch

        torch.distributed.broadcast(tensor, 0)


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Only the first process prints on stdout within the block."""
    if is_first():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def part() -> None:
    """Leave the process group: from here on each process works by itself."""
    if world_size() == 1:
        return
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def go_on_alone(command: Sequence[str]) -> NoReturn:
    """Become another program that works by itself, under the same process id.

    All that this process holds is freed, its memory on a GPU too, which a child would find taken.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    open_files = Path("/proc/self/fd")
    for number in [int(path.name) for path in open_files.iterdir()] if open_files.exists() else []:
        if number > 2:
            with contextlib.suppress(OSError):  # the listing's own is closed by now
                os.set_inheritable(number, False)
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    os.execve(command[0], list(command), environment)
