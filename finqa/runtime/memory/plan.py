"""The plan before the work: what a stage needs and what there is, printed before a model is loaded.

A stage that cannot fit stops here, with one line that names the flag that helps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from finqa.runtime import parallel
from finqa.runtime.errors import UserError
from finqa.runtime.memory.free import free_memory
from finqa.runtime.memory.needs import (
    GB,
    MERGED_FILE_GB,
    WORKSPACE,
    WRITTEN_SHARE,
    Load,
    Need,
    disk_need,
    evaluation_need,
    read_config,
    sizes,
    training_need,
)
from finqa.training import packing
from finqa.training.trainable import Speed, seconds_of_compiling

if TYPE_CHECKING:
    from datasets import Dataset

    from finqa.evaluation.engines.caches import Extent
    from finqa.evaluation.generation import GenerationConfig
    from finqa.models.students import StudentRun

USABLE = 0.95
"""Share of the free memory that a plan counts on: the allocator loses some between its blocks."""


def fitting_speed(
    need: Callable[[Speed], Need], speed: Speed, free: float, checkpointing: bool | None
) -> tuple[Speed, Need]:
    """The fastest way of computing a step that fits: as asked for, without CUDA graphs, or with checkpointing.

    `checkpointing` forces (True) or forbids (False) the last; None allows it. Where none fits, the last one tried.
    """
    plain = replace(speed, checkpointing=False)
    ways = [] if checkpointing else [plain, replace(plain, captured=False)]
    if checkpointing is not False:
        ways.append(replace(plain, captured=False, checkpointing=True))
    for way in ways:
        if need(way).total <= USABLE * free:
            return way, need(way)
    return ways[-1], need(ways[-1])


def plan_training(
    run: StudentRun,
    speed: Speed,
    rows: Dataset,
    seed: int,
    folder: Path,
    device: str,
    bits: int,
    compiled_before: bool = False,
) -> Speed:
    """Print what training on `rows` needs and what there is; returns `speed` with what was left open decided.

    Args:
        rows: The training rows (finqa.training.rows.Example).
        folder: Where checkpoints and student are written.
        device: `cpu`, `cuda` or `cuda:<n>`: whose free memory is meant. Processes on one CPU share it.
        bits: 32 on a device without bf16 products, else 16.
        compiled_before: Whether the layers of such a run were compiled on this machine before.

    Raises UserError, one line with the flag that helps, where memory or disk do not suffice.
    """
    settings = run.settings
    config = read_config(run.model, run.revision)
    model = sizes(config, settings.lora_modules if run.peft else (), settings.lora_r)
    if run.peft and model.missing:
        raise UserError(
            f"{run.model} has no layers called {', '.join(model.missing)}; name its own with --lora-modules: "
            f"{', '.join(model.linear)}"
        )
    on_gpu, processes = device != "cpu", parallel.world_size()
    packed = on_gpu and speed.packed and config.model_type in packing.FAMILIES
    recorded = packing.longest_graph(model.hidden, model.intermediate)
    load = Load.of(rows, settings.batch_size, settings.num_epochs, seed, packed, recorded)
    there = free_memory(device) / (1 if on_gpu else processes)

    def need(way: Speed, load: Load = load, bits: int = 4 if run.load_in_4bit else bits) -> Need:
        return training_need(model, load, settings.optim, way, bits, on_gpu, processes)

    speed = replace(speed, packed=packed, captured=packed and speed.captured)
    chosen, planned = fitting_speed(need, speed, there, speed.checkpointing)
    tokens, n_rows = (n * settings.num_epochs // processes for n in (sum(rows["n_tokens"]), len(rows)))
    batches = -(-n_rows // settings.batch_size)
    takes, saves = seconds_of_compiling(model.parameters, model.layers, tokens, batches, compiled_before)
    # What is not compiled holds more. CUDA graphs were seen with compiled layers alone.
    plain = replace(chosen, compiled=False, captured=False)
    if on_gpu and speed.compiled is None and saves < takes and need(plain).total <= USABLE * there:
        chosen, planned = plain, need(plain)
        print(f"layers are not compiled: that takes about {takes:.0f} s and saves about {saves:.0f} of this run "
              "(--compile, where more runs of this model follow)", flush=True)  # fmt: skip
    chosen = replace(chosen, compiled=chosen.compiled is not False)
    print_need("training", planned, there, device)
    if planned.total > USABLE * there:
        raise UserError(_does_not_fit(run, need, chosen, load, planned, there))
    # What checkpoints of a run that goes on already take is not asked for again.
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    left = max(0.0, disk_need(model, settings.optim) - written)
    check_disk(folder, left, "checkpoints and student", "make room there or choose another --data-dir")
    return chosen


def _does_not_fit(
    run: StudentRun, need: Callable[..., Need], way: Speed, load: Load, planned: Need, there: float
) -> str:
    """One line: what is missing, and each flag that alone would help."""
    lean = replace(way, checkpointing=True, captured=False)
    rows = run.settings.batch_size
    one_row = Load(load.longest, load.longest, -(-load.targets // rows))
    shorter = replace(load, tokens=load.tokens // 2, longest=load.longest // 2)
    helps = {
        "--gradient-checkpointing yes": need(lean) if not way.checkpointing else None,
        "-F": need(way, bits=4) if run.peft and not run.load_in_4bit else None,
        "-P": None if run.peft else training_need_with_adapter(run, lean, load),
        f"-BS 1 -GA {rows * run.grad_accum}": need(way, load=one_row) if rows > 1 else None,
        f"--max-seq-length {shorter.longest}": need(way, load=shorter),
    }
    fits = [flag for flag, less in helps.items() if less and less.total <= USABLE * there]
    all_of_it = need(lean, load=one_row, bits=4 if run.peft else 16)
    if fits:
        remedy = "what helps is " + " or ".join(fits)
    elif all_of_it.total <= USABLE * there:
        together = "-F -BS 1 --gradient-checkpointing yes" if run.peft else "-BS 1 --gradient-checkpointing yes"
        remedy = f"what helps is all of {together}"
    else:
        remedy = "neither -F nor --gradient-checkpointing yes nor -BS 1 is enough; use a GPU with more memory"
    return f"training needs {amount(planned.total)} of memory and {amount(there)} are free; {remedy}"


def training_need_with_adapter(run: StudentRun, way: Speed, load: Load) -> Need:
    """Memory of the same run if it trained the adapter of its settings in place of all weights."""
    model = sizes(read_config(run.model, run.revision), run.settings.lora_modules, run.settings.lora_r)
    return training_need(model, load, run.settings.optim, way)


def plan_evaluation(run: StudentRun, config: GenerationConfig, batches: Iterable[Extent]) -> None:
    """Print what Hugging Face's generation needs and what there is; UserError where its largest batch cannot fit."""
    from finqa.models.students import default_device

    modules = run.settings.lora_modules if run.peft else ()
    model = sizes(read_config(run.model, run.revision), modules, run.settings.lora_r)
    device = default_device()
    bits = 16 if parallel.multiplies_bf16(device) else 32
    needs = [evaluation_need(model, batch, config.max_new_tokens, run.load_in_4bit, bits) for batch in batches]
    if not needs:  # no prompt leaves room for a reply, which is said of each
        return
    helps = ["a smaller -EBS", *([] if run.load_in_4bit else ["-F"]), "a smaller --max-model-len"]
    largest = max(needs, key=lambda need: need.total)
    check_fits("evaluation", largest, free_memory(device), device, f"what helps: {', '.join(helps)}")


def plan_merging(base: Path, adapter: Path, folder: Path) -> None:
    """Print what merging an adapter into its base takes; UserError where memory or the disk of `folder` is too small.

    Args:
        base, adapter: Folders with safetensors files; what they hold is held in memory too.
    """
    weights, added = (
        float(sum(file.stat().st_size for file in path.glob("*.safetensors"))) for path in (base, adapter)
    )
    written = min(WRITTEN_SHARE * weights, MERGED_FILE_GB * GB)
    need = Need(
        (
            ("base model", weights, ""),
            ("adapter", added, ""),
            ("a file as it is written", written, ""),
            ("workspace", WORKSPACE, "a matrix in fp32"),
        )
    )
    check_fits("merging", need, free_memory("cpu"), "cpu", "merge on a machine that has more")
    check_disk(folder, weights, "the merged model", "make room there")


def print_need(stage: str, need: Need, there: float, device: str) -> None:
    """Print what a stage needs, one line per part, and what is free."""
    where = "on the GPU" if device != "cpu" else "in the machine's memory"
    print(f"plan: {stage} needs {amount(need.total)}; {amount(there)} are free {where}", flush=True)
    for name, size, why in need.parts:
        print(f"  {name:<23}{amount(size):>9}  {why}".rstrip(), flush=True)


def check_fits(stage: str, need: Need, there: float, device: str, remedy: str, usable: float = 1.0) -> None:
    """Print what a stage needs and what is free; UserError, which ends with `remedy`, where it takes more than the
    share `usable` of that."""
    print_need(stage, need, there, device)
    if need.total > usable * there:
        raise UserError(f"{stage} needs {amount(need.total)} of memory and {amount(there)} are free; {remedy}")


def amount(size: float) -> str:
    """Bytes in GB or, below one, in MB."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def check_disk(folder: Path, need: float, what: str, remedy: str) -> None:
    """Print what a stage writes and what is free; UserError, which ends with `remedy`, where that is too little."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    print(f"  {'disk':<23}{amount(need):>9}  {what}; {amount(free)} are free", flush=True)
    if need > free:
        raise UserError(f"{folder} needs {amount(need)} of disk and {amount(free)} are free; {remedy}")
