"""Which GPUs or processors each vLLM engine takes, and what vLLM has to be told of them."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from finqa.evaluation.generation import GenerationConfig
from finqa.models.students import default_device
from finqa.runtime.errors import UserError


def device_shares(engines: int, each: int) -> list[list[str]]:
    """The devices of each engine: ids of visible GPUs, or numbers of processors. Raises UserError with too few GPUs."""
    if default_device() == "cpu":
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        return [cores[number::engines] or cores for number in range(engines)]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if len(gpus) < engines * each:
        raise UserError(
            f"--data-parallel {engines} with --tensor-parallel {each} needs {engines * each} GPUs and {len(gpus)} are "
            "visible; give a smaller number"
        )
    return [gpus[number * each : (number + 1) * each] for number in range(engines)]


def over_machines(tensor_parallel: int) -> dict[str, Any]:
    """What vLLM has to be told where an engine takes more GPUs than this machine has: the others are Ray's.

    Raises UserError where Ray is not installed.
    """
    import torch

    there = torch.cuda.device_count()
    if tensor_parallel <= max(1, there):
        return {}
    if importlib.util.find_spec("ray") is None:
        raise UserError(
            f"--tensor-parallel {tensor_parallel} needs as many GPUs, and {there} are here; give a smaller number, or "
            "join machines by Ray, which is not installed (docs/reproduce.md, Several GPUs and machines)"
        )
    # vLLM's own sums over GPUs are for those of one machine, and look for the others' there.
    return {"distributed_executor_backend": "ray", "disable_custom_all_reduce": True}


def without_multicast(tensor_parallel: int) -> dict[str, Any]:
    """What vLLM is told where NCCL's variable says that NVLink multicast is off: flashinfer's sums do not ask it."""
    if tensor_parallel == 1 or os.environ.get("NCCL_NVLS_ENABLE") != "0":
        return {}
    os.environ |= {"VLLM_ALLREDUCE_USE_FLASHINFER": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
    return {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}


def share_cores(tensor_parallel: int) -> None:
    """Have the processes of an engine on a CPU take a part of its cores each: left to itself vLLM wants a memory node
    for each. Raises UserError where there are fewer cores than processes."""
    cores = sorted(os.sched_getaffinity(0))
    if tensor_parallel > len(cores):
        raise UserError(f"--tensor-parallel {tensor_parallel} needs a core each, and an engine has {len(cores)} here")
    if tensor_parallel > 1:
        parts = (cores[number::tensor_parallel] for number in range(tensor_parallel))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, part)) for part in parts))


def check_gpus_are_free(config: GenerationConfig) -> None:
    """UserError where something else holds what an engine is to take. Asked when a start has failed: to ask takes
    memory of the GPU itself."""
    import torch

    for gpu in range(min(config.tensor_parallel, torch.cuda.device_count())):
        free, there = torch.cuda.mem_get_info(gpu)
        if free < config.gpu_memory_utilization * there:
            raise UserError(
                f"vLLM is to take {config.gpu_memory_utilization:.0%} of GPU {gpu}, and {free / 1e9:.1f} of its "
                f"{there / 1e9:.1f} GB are free; end what else uses it, or give a smaller share "
                f"(--gpu-memory-utilization {max(0, int(100 * free / there) - 2) / 100})"
            )
