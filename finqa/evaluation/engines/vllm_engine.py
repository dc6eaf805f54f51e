"""Replies by vLLM, on a GPU or a CPU: an engine in this process, or several beside it (data_parallel)."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from finqa.evaluation.engines.devices import check_gpus_are_free, over_machines, share_cores, without_multicast
from finqa.evaluation.generation import (
    FinishReason,
    Generate,
    GenerationConfig,
    Reply,
    cut_at_stop,
    is_reasoning,
    opened_by,
    prompt_too_long,
)
from finqa.models.students import default_device
from finqa.runtime.errors import UserError
from finqa.runtime.memory.free import free_memory
from finqa.runtime.parallel import multiplies_bf16

CONTEXT = 8192
"""Tokens of context that are planned for at most unless told otherwise: a 128k model would ask for a huge cache."""
CPU_SEQUENCES = 256
"""Replies that are written at the same time on a CPU."""
CPU_BATCH_TOKENS = 4096
"""Tokens of prompts that are read together on a CPU: what vLLM takes by itself."""
TOP_LOGPROBS = 20
"""Likeliest tokens of which log-probabilities are asked: the most an engine gives unless told otherwise."""


LogProbs = Callable[[Sequence[tuple[list[int], int]]], list[list[dict[int, float]]]]
"""From sequences (token ids, how many of them are prompt) to log-probabilities by token id, for every completion token
of each: of the likeliest tokens at its place, and of itself."""


@dataclass(frozen=True)
class EngineArguments:
    """What an engine is started with; plain values, so that another process can start it too."""

    model: str
    """Folder of the model."""
    tokenizer: str
    load_in_4bit: bool
    config: GenerationConfig
    adapter: Path | None
    """Folder of the adapter that requests may name."""
    random_weights: bool = False
    """Weights of the model's shapes that are made up, for measuring speed: the folder holds none."""


@contextmanager
def vllm_engine(arguments: EngineArguments) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A running vLLM engine and what is worth recording of it; it is gone at the end of the block."""
    config, adapter = arguments.config, arguments.adapter
    _check_one_copy(Path(arguments.model))
    shape = json.loads((Path(arguments.model) / "config.json").read_text())
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    device, show = default_device(), sys.stderr.isatty()
    settings: dict[str, Any] = {
        "max_model_len": min(shape.get("max_position_embeddings", CONTEXT), config.max_model_len or CONTEXT),
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": True,
        "seed": 0,
        # What transformers reads: vLLM would take a second copy in Mistral's own form where one is beside it.
        "config_format": "hf",
        "load_format": "dummy" if arguments.random_weights else "safetensors",
    }
    if device == "cpu":
        # Both must be set before the import: a second process would cost half a minute to start.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        settings |= {
            "enforce_eager": True,
            "max_num_seqs": CPU_SEQUENCES,
            "kv_cache_memory_bytes": _cpu_cache_bytes(shape, settings["max_model_len"], config),
        }
        share_cores(config.tensor_parallel)
        if not multiplies_bf16(device):
            settings["dtype"] = "float32"
        if config.temperature:
            # A sample that draws from its own seed is given back where a prompt was read in part, which the random
            # generators of a CPU cannot do: read prompts whole.
            settings |= {
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_BATCH_TOKENS, settings["max_model_len"]),
            }
    else:
        settings |= {"gpu_memory_utilization": config.gpu_memory_utilization, "enforce_eager": config.enforce_eager}
        settings |= over_machines(config.tensor_parallel) | without_multicast(config.tensor_parallel)
        # vLLM forks its engine where CUDA is not initialised. Having asked how many GPUs there are does not count as
        # that, but a process forked after it can use none.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("FLASHINFER_LOGGING_LEVEL", "warning")
        if not show:
            os.environ.setdefault("TQDM_DISABLE", "1")  # some of its bars are drawn whatever vLLM is told
    if config.kv_cache_gb is not None:
        _check_cache_holds_a_reply(shape, settings["max_model_len"], config)
        settings["kv_cache_memory_bytes"] = int(config.kv_cache_gb * 1e9)
    if arguments.load_in_4bit:
        settings |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    if adapter is not None:
        settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank_limit(adapter)}

    started = time.monotonic()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from vllm import LLM

        try:
            engine = LLM(
                model=arguments.model,
                tokenizer=arguments.tokenizer,
                disable_log_stats=True,
                use_tqdm_on_load=show,
                **settings,
            )
        except (RuntimeError, ValueError):
            if device != "cpu":
                check_gpus_are_free(config)
            raise
    facts = {"engine": "vllm", "device": device, "dtype": str(engine.model_config.dtype).removeprefix("torch.")}
    try:
        yield engine, facts | {"settings": settings, "start_seconds": round(time.monotonic() - started, 1)}
    finally:
        from vllm.distributed import cleanup_dist_env_and_memory

        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def _check_one_copy(model: Path) -> None:
    """UserError where vLLM would read two copies of the weights: without an index it takes every file that is there."""
    second = sorted(model.glob("consolidated*.safetensors"))
    if second and (model / "model.safetensors").exists():
        raise UserError(f"{second[0]} is a second copy of the weights, which vLLM would mix in; move it elsewhere")


def vllm_generate(engine: Any, ends: Collection[int], config: GenerationConfig, adapter: Path | None) -> Generate:
    """Replies by a vLLM engine, all prompts at once; with an adapter where one is given.

    The engine is stepped here and not by `LLM.generate`, which gives nothing before all is written. What shares a
    batch differs between a run and one that goes on, so in bf16 a near-tie may fall the other way; a sample that
    draws from its own seed has the same near-ties. A reply that a stop string ended inside its reasoning is asked for
    again from there: vLLM knows no place where its stop strings do not count.
    """

    def generate(prompts: Sequence[list[int]], done: Collection[int] = ()) -> Iterator[tuple[int, Reply]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        steps, request, tokenizer = engine.llm_engine, _lora_request(adapter), engine.get_tokenizer()
        limit = engine.model_config.max_model_len
        under_way: set[str] = set()
        before: dict[int, list[int]] = {}

        def ask(place: int) -> None:
            tokens = before.get(place, [])
            sampling = SamplingParams(
                temperature=config.temperature,
                seed=config.seed_of(place) + len(tokens) if config.temperature else None,
                max_tokens=config.max_new_tokens - len(tokens),
                stop=list(config.stop),
                include_stop_str_in_output=True,
                stop_token_ids=sorted(ends),
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt, name = TokensPrompt(prompt_token_ids=[*prompts[place], *tokens]), f"{place}.{len(tokens)}"
            steps.add_request(name, prompt, sampling, lora_request=request)
            under_way.add(name)

        for place in sorted(set(range(len(prompts))) - set(done)):
            if len(prompts[place]) + config.max_new_tokens > limit:
                yield place, prompt_too_long(prompts[place])
                continue
            ask(place)
        try:
            while under_way:
                for output in steps.step():
                    under_way.discard(output.request_id)
                    place, written = int(output.request_id.partition(".")[0]), output.outputs[0]
                    opened, text = opened_by(prompts[place], tokenizer), written.text
                    tokens = [*before.pop(place, []), *written.token_ids]
                    if len(tokens) > len(written.token_ids):
                        text = tokenizer.decode(tokens, skip_special_tokens=True)
                    thinks = isinstance(written.stop_reason, str) and is_reasoning(text, opened)
                    if thinks and len(tokens) < config.max_new_tokens:
                        before[place] = tokens
                        ask(place)
                        continue
                    reason: FinishReason = "length" if thinks or written.finish_reason == "length" else "stop"
                    cut = cut_at_stop(text, config.stop, opened)
                    yield place, Reply(cut, len(prompts[place]), len(tokens), reason)
        finally:
            if under_way:
                steps.abort_request(sorted(under_way))

    return generate


def vllm_logprobs(engine: Any, adapter: Path | None) -> LogProbs:
    """Log-probabilities of completion tokens by a vLLM engine: the TOP_LOGPROBS likeliest and the token itself."""

    def logprobs(sequences: Sequence[tuple[list[int], int]]) -> list[list[dict[int, float]]]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        outputs = engine.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids, _ in sequences],
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=TOP_LOGPROBS),
            use_tqdm=False,
            lora_request=_lora_request(adapter),
        )
        return [
            [{token: entry.logprob for token, entry in place.items()} for place in output.prompt_logprobs[n_prompt:]]
            for output, (_, n_prompt) in zip(outputs, sequences, strict=True)
        ]

    return logprobs


def _lora_request(adapter: Path | None) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("student", 1, str(adapter)) if adapter else None


def _rank_limit(adapter: Path) -> int:
    """The smallest rank that vLLM can be set to and that holds the adapter's."""
    from vllm.config.lora import MaxLoRARanks

    settings = json.loads((adapter / "adapter_config.json").read_text())
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    allowed = [limit for limit in get_args(MaxLoRARanks) if limit >= rank]
    if not allowed:
        most = max(get_args(MaxLoRARanks))
        raise UserError(f"vLLM serves no adapter of rank {rank} (at most {most}); leave out --VLLM, or merge it first")
    return min(allowed)


def _cpu_cache_bytes(shape: dict[str, Any], max_model_len: int, config: GenerationConfig) -> int:
    """Cache for all sequences at full length, but for all processes at most a third of the memory that is free."""
    wanted = _token_bytes(shape) * max_model_len * CPU_SEQUENCES // config.tensor_parallel
    processes = config.data_parallel * config.tensor_parallel
    return max(1 << 26, min(wanted, int(free_memory("cpu")) // (3 * processes)))


def _token_bytes(shape: dict[str, Any]) -> int:
    """Bytes of one token's keys and values, 16 bits each where the device has such products; `shape`: config.json."""
    heads = shape["num_attention_heads"]
    width = shape.get("head_dim") or shape["hidden_size"] // heads
    kv_heads, size = shape.get("num_key_value_heads") or heads, 2 if multiplies_bf16(default_device()) else 4
    return 2 * size * shape["num_hidden_layers"] * kv_heads * width


def _check_cache_holds_a_reply(shape: dict[str, Any], max_model_len: int, config: GenerationConfig) -> None:
    """UserError where the cache that is asked for is too small for one prompt and reply of full length."""
    window = shape.get("sliding_window") or max_model_len
    needed = _token_bytes(shape) * min(max_model_len, window) / config.tensor_parallel / 1e9
    if config.kv_cache_gb is not None and config.kv_cache_gb < needed:
        raise UserError(
            f"--kv-cache-gb {config.kv_cache_gb:g} does not hold one prompt and reply of {max_model_len:,} tokens, "
            f"which take {needed:.2g} GB; raise it, or give a smaller --max-model-len"
        )
