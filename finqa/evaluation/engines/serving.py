"""Which engine replies, and how it gets the adapter: decided here alone.

vLLM on a CPU serves an adapter by request some sixty times slower than a base, so there it is merged into its base
first; vLLM on a GPU takes it with the request; Hugging Face puts it on the loaded base.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from finqa.evaluation.engines.data_parallel import parallel_engines
from finqa.evaluation.engines.vllm_engine import EngineArguments, LogProbs, vllm_engine, vllm_generate, vllm_logprobs
from finqa.evaluation.generation import Generate, GenerationConfig, end_ids
from finqa.models.adapters import check_adapter, is_adapter
from finqa.models.merging import merged
from finqa.models.students import (
    StudentRun,
    default_device,
    load_adapter,
    load_base,
    quiet_libraries,
    resolve_model,
    tokenizer_of,
)
from finqa.models.weights import check_base
from finqa.runtime.errors import UserError
from finqa.runtime.parallel import multiplies_bf16

Model = Literal["base", "fine-tuned"]
MODELS: tuple[Model, ...] = get_args(Model)


@dataclass(frozen=True)
class Served:
    """A model that is ready to reply."""

    model: Model
    generate: Generate
    facts: dict[str, Any]
    """Engine, adapter (none, merged, unmerged, request), dtype, device: for run.json."""
    logprobs: LogProbs | None = None
    """Log-probabilities by the model, which one vLLM engine alone can give."""


def check_backend(run: StudentRun, vllm: bool) -> None:
    """UserError, before anything heavy, where this machine cannot evaluate the student with the chosen engine."""
    if vllm and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed (--VLLM); install it with: pip install -r requirements.txt (a GPU machine) or "
            "-r requirements-cpu.txt, or leave out --VLLM to use Hugging Face generate"
        )
    if vllm and run.load_in_4bit and default_device() == "cpu":
        raise UserError("vLLM has no 4-bit base on a CPU (-F); leave out --VLLM to use Hugging Face generate")


def served_models(
    run: StudentRun, student: Path | None, wanted: Sequence[Model], config: GenerationConfig
) -> Generator[Served, None, None]:
    """The wanted models one after the other, with as few engine starts as possible; each is valid until the next.

    Args:
        run: Names the base model.
        student: Folder of the adapter or fine-tuned model; may be None where only the base is wanted.
        wanted: `base`, `fine-tuned` or both.

    Raises UserError where the student was trained on another base.
    """
    quiet_libraries()
    if student is not None:
        base = resolve_model(run.model, run.revision)
        check_adapter(student, base)
        check_base(student, base)
    elif "fine-tuned" in wanted:
        raise ValueError("a fine-tuned model is wanted and no folder given")
    adapter = student is not None and is_adapter(student)
    with closing((_by_vllm if config.vllm else _by_hugging_face)(run, student, adapter, wanted, config)) as models:
        for served in models:
            folder = student if served.model == "fine-tuned" and served.facts["adapter"] == "none" else None
            not_used = _not_used(folder or Path(resolve_model(run.model, run.revision)))
            yield replace(served, facts=served.facts | {"generation_config_not_used": not_used})


def _not_used(model: Path) -> dict[str, Any]:
    """What a model's generation_config says beside its special tokens: no engine here obeys it."""
    path = model / "generation_config.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    kept = [
        name for name in sorted(said) if not re.search("_token_id$|_version$|_config$|^output_|^_|^use_cache$", name)
    ]
    return {name: said[name] for name in kept}


def _by_hugging_face(
    run: StudentRun, student: Path | None, adapter: bool, wanted: Sequence[Model], config: GenerationConfig
) -> Generator[Served, None, None]:
    from finqa.evaluation.engines.hugging_face_engine import hugging_face

    tokenizer = tokenizer_of(run, student)
    dtype = "bfloat16" if multiplies_bf16(default_device()) else "float32"
    facts = {"engine": "transformers", "device": default_device(), "dtype": dtype, "batch_size": config.batch_size}
    if "base" in wanted or adapter:
        model: Any = load_base(run.model, None, None, run.load_in_4bit, run.revision)
        if "base" in wanted:
            yield Served("base", hugging_face(model, tokenizer, config), facts | {"adapter": "none"})
        if "fine-tuned" in wanted and adapter and student is not None:
            model = load_adapter(model, student).eval()
            yield Served("fine-tuned", hugging_face(model, tokenizer, config), facts | {"adapter": "unmerged"})
        del model
    if "fine-tuned" in wanted and not adapter:
        whole = load_base(str(student))
        yield Served("fine-tuned", hugging_face(whole, tokenizer, config), facts | {"adapter": "none"})


def _by_vllm(
    run: StudentRun, student: Path | None, adapter: bool, wanted: Sequence[Model], config: GenerationConfig
) -> Generator[Served, None, None]:
    """One engine a model; on a GPU one for base and adapter.

    An adapter of rank 512 takes 2.2 times the base's time on a 7B model (benchmarks/results/evaluation_lora.md), which
    is less than merging it and starting a second engine for the thousand rows of a split.
    """
    tokenizer: Any = tokenizer_of(run, student)
    ends = end_ids(tokenizer.eos_token_id)
    base = resolve_model(run.model, run.revision)
    by_request = adapter and default_device() != "cpu"
    models: list[Model] = [model for model in MODELS if model in wanted]
    groups: list[list[Model]] = [models] if by_request else [[model] for model in models]
    for together in groups:
        folder: Any = nullcontext(base)
        if student is not None and together == ["fine-tuned"] and not by_request:
            folder = merged(run.model, student, run.revision) if adapter else nullcontext(student)
        with folder as path:
            arguments = EngineArguments(str(path), base, run.load_in_4bit, config, student if by_request else None)
            with running_engine(arguments) as engine:
                for model in together:
                    adapted = by_request and model == "fine-tuned"
                    how = "request" if adapted else "merged" if adapter and model == "fine-tuned" else "none"
                    logprobs = engine.logprobs and engine.logprobs(adapted)
                    yield Served(model, engine.generate(adapted, ends), engine.facts | {"adapter": how}, logprobs)


@dataclass(frozen=True)
class RunningEngine:
    """One engine, or several that share the prompts."""

    generate: Callable[[bool, set[int]], Generate]
    """Takes whether to reply with the adapter, and the end tokens."""
    facts: dict[str, Any]
    """For run.json."""
    logprobs: Callable[[bool], LogProbs] | None
    """Takes whether to use the adapter; None with several engines."""


@contextmanager
def running_engine(arguments: EngineArguments) -> Iterator[RunningEngine]:
    """As many vLLM engines as the configuration asks for; they are gone at the end of the block."""
    print(f"starting vLLM{'' if default_device() == 'cpu' else ', which takes a minute or two'}", flush=True)
    if arguments.config.data_parallel > 1:
        with parallel_engines(arguments) as (generate, facts):
            yield RunningEngine(generate, facts, None)
        return
    with vllm_engine(arguments) as (engine, facts):
        config, adapter = arguments.config, arguments.adapter
        yield RunningEngine(
            lambda adapted, ends: vllm_generate(engine, ends, config, adapter if adapted else None),
            facts,
            lambda adapted: vllm_logprobs(engine, adapter if adapted else None),
        )
