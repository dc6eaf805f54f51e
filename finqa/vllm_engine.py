"""Replies by vLLM, on a GPU or a CPU."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finqa.generation import (
    FinishReason,
    Generate,
    GenerationConfig,
    Reply,
    cut_at_stop,
    end_ids,
    prompt_too_long,
)
from finqa.students import default_device

CONTEXT = 8192
"""Tokens of context that are planned for at most unless told otherwise: a 128k model would ask for a huge cache."""
CPU_SEQUENCES = 256
"""Replies that are written at the same time on a CPU."""


@contextmanager
def vllm_engine(
    model: str, tokenizer: str, load_in_4bit: bool, config: GenerationConfig, adapter: Path | None
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A running vLLM engine and what is worth recording of it; it is gone at the end of the block."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    device = default_device()
    settings: dict[str, Any] = {
        "max_model_len": _limit_of(Path(model), config),
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    if device == "cpu":
        # Both must be set before the import: a second process would cost half a minute to start.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        settings |= {
            "enforce_eager": True,
            "max_num_seqs": CPU_SEQUENCES,
            "kv_cache_memory_bytes": _cpu_cache_bytes(Path(model), settings["max_model_len"]),
        }
    else:
        settings["gpu_memory_utilization"] = config.gpu_memory_utilization
    if load_in_4bit:
        settings["quantization"] = "bitsandbytes"
    if adapter is not None:
        rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
        settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}

    started = time.monotonic()
    show = sys.stderr.isatty()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from vllm import LLM

        engine = LLM(model=model, tokenizer=tokenizer, disable_log_stats=True, use_tqdm_on_load=show, **settings)
    facts = {"engine": "vllm", "device": device, "dtype": str(engine.model_config.dtype).removeprefix("torch.")}
    try:
        yield engine, facts | {"settings": settings, "start_seconds": round(time.monotonic() - started, 1)}
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def vllm_generate(engine: Any, tokenizer: Any, config: GenerationConfig, adapter: Path | None) -> Generate:
    """Greedy replies by a vLLM engine, all prompts at once; with an adapter where one is given."""

    def generate(prompts: Sequence[list[int]]) -> list[Reply]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=config.max_new_tokens,
            stop=list(config.stop),
            include_stop_str_in_output=True,
            stop_token_ids=sorted(end_ids(tokenizer.eos_token_id)),
        )
        limit = engine.model_config.max_model_len
        fitting = [row for row, prompt in enumerate(prompts) if len(prompt) + config.max_new_tokens <= limit]
        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=prompts[row]) for row in fitting],
            sampling,
            use_tqdm=sys.stderr.isatty(),
            lora_request=LoRARequest("student", 1, str(adapter)) if adapter else None,
        )
        replies = [prompt_too_long(prompt) for prompt in prompts]
        for row, output in zip(fitting, outputs, strict=True):
            best = output.outputs[0]
            reason: FinishReason = "length" if best.finish_reason == "length" else "stop"
            text = cut_at_stop(best.text, config.stop)
            replies[row] = Reply(text, len(prompts[row]), len(best.token_ids), reason)
        return replies

    return generate


def _limit_of(model: Path, config: GenerationConfig) -> int:
    own = json.loads((model / "config.json").read_text()).get("max_position_embeddings", CONTEXT)
    return min(own, config.max_model_len or CONTEXT)


def _cpu_cache_bytes(model: Path, max_model_len: int) -> int:
    """Cache for all sequences at full length, but at most a third of the memory that is free."""
    shape = json.loads((model / "config.json").read_text())
    heads = shape["num_attention_heads"]
    width = shape.get("head_dim") or shape["hidden_size"] // heads
    token = 2 * 2 * shape["num_hidden_layers"] * (shape.get("num_key_value_heads") or heads) * width
    wanted = token * max_model_len * CPU_SEQUENCES
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 1 << 20
    return max(1 << 26, min(wanted, pages * os.sysconf("SC_PAGE_SIZE") // 3))
