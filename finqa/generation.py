"""Replies to prompts: what every engine takes and gives. `serving` starts the engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from finqa.errors import UserError
from finqa.prompts import STOP

FinishReason = Literal["stop", "length", "prompt_too_long"]


@dataclass(frozen=True)
class Reply:
    """What a model wrote to one prompt."""

    text: str
    """Without special tokens, up to the first stop string and with it."""
    n_prompt_tokens: int
    n_new_tokens: int
    finish_reason: FinishReason
    """`stop`: end token or stop string; `length`: the limit of new tokens; `prompt_too_long`: nothing was asked."""


Generate = Callable[[Sequence[list[int]]], list[Reply]]
"""Greedy replies to prompts given as token ids, in their order."""


@dataclass(frozen=True)
class GenerationConfig:
    """How replies are generated."""

    vllm: bool
    """vLLM, or Hugging Face generate."""
    max_new_tokens: int
    batch_size: int
    """Prompts in a call of Hugging Face generate; vLLM takes all at once."""
    stop: tuple[str, ...] = STOP
    max_model_len: int | None = None
    """Longest prompt and reply together, in tokens; None takes the model's own limit, vLLM at most 8,192."""
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    """GPUs that share one model (vLLM)."""

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise UserError(f"--gpu-memory-utilization must be in (0, 1], not {self.gpu_memory_utilization}")
        if min(self.max_new_tokens, self.batch_size, self.tensor_parallel) < 1:
            raise UserError("new tokens, batch size and tensor parallel must be at least 1")


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """Text up to the end of the first stop string in it, or all of it."""
    ends = [text.index(string) + len(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


def prompt_too_long(prompt: list[int]) -> Reply:
    """The reply to a prompt that leaves no room for one."""
    return Reply("", len(prompt), 0, "prompt_too_long")


def end_ids(*values: int | list[int] | None) -> set[int]:
    """The end tokens among what model and tokenizer call theirs."""
    ends: set[int] = set()
    for value in values:
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends
