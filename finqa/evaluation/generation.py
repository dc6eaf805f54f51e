"""Replies to prompts: what every engine takes and gives. `serving` starts the engines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from finqa.runtime.command_line import check_bounds, flag, option
from finqa.runtime.errors import UserError
from finqa.task import prompts
from finqa.task.prompts import STOP

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


class Generate(Protocol):
    """Replies to prompts given as token ids, each with its place among them, in the order in which they finish.

    `done` names places that need no reply. All prompts are given even so: an engine that works in batches forms them
    from all, and a sample draws from a seed of its place, so that a run that goes on writes what a whole one writes.
    """

    def __call__(self, prompts: Sequence[list[int]], done: Collection[int] = ()) -> Iterator[tuple[int, Reply]]: ...


def all_replies(generate: Generate, prompts: Sequence[list[int]]) -> list[Reply]:
    """Every reply, in the order of the prompts."""
    replies = dict(generate(prompts))
    return [replies[place] for place in range(len(prompts))]


PROMPT_TAIL = 16
"""Tokens at the end of a prompt that are searched for the mark by which a template opens the model's reasoning."""
DEFAULT_TEMPERATURE = 0.7
"""Temperature of several samples, unless told otherwise."""


@dataclass(frozen=True)
class GenerationConfig:
    """How replies are generated."""

    vllm: bool = field(metadata=option("--VLLM", "--vllm"))
    """Generate by vLLM, not by Hugging Face."""
    max_new_tokens: int
    batch_size: int
    """Prompts in a call of Hugging Face generate; vLLM takes all at once."""
    stop: tuple[str, ...] = STOP
    max_model_len: int | None = flag(None, metavar="TOKENS", shown="the model's own limit, with vLLM at most 8,192")
    """Longest prompt and reply together, in tokens."""
    gpu_memory_utilization: float = flag(0.9, metavar="SHARE", above=0, most=1)
    """Share of the GPU's memory that vLLM may take."""
    kv_cache_gb: float | None = flag(None, metavar="GB", shown="on a GPU what --gpu-memory-utilization leaves", above=0)
    """Keys and values that vLLM keeps, in 1e9 bytes: for a GPU that other processes use, whose memory vLLM would take
    for its own."""
    enforce_eager: bool = flag(False)
    """vLLM compiles nothing and records no CUDA graphs: a shorter start, slower replies. On a CPU it is always so."""
    tensor_parallel: int = flag(1, metavar="GPUS", least=1)
    """GPUs that share one model (vLLM)."""
    data_parallel: int = flag(1, metavar="ENGINES", least=1)
    """Engines that share the prompts, each with GPUs of its own (vLLM)."""
    samples: int = flag(1, least=1)
    """Replies to each question, whose answers are voted on."""
    temperature: float = flag(0.0, shown=f"0, with several samples {DEFAULT_TEMPERATURE}", least=0)
    """0 takes the likeliest token (greedy)."""
    seed: int = 3
    """Seed of sampling; greedy replies do not use it."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.samples > 1 and self.temperature == 0:
            raise UserError("--samples above 1 needs a --temperature above 0: greedy replies are all the same")
        if not self.vllm and (self.kv_cache_gb is not None or self.enforce_eager):
            raise UserError("--kv-cache-gb and --enforce-eager need --VLLM")
        if not self.vllm and max(self.tensor_parallel, self.data_parallel) > 1:
            raise UserError("--tensor-parallel and --data-parallel need --VLLM")

    @property
    def folder_suffix(self) -> str:
        """What the name of a results folder ends with: nothing for greedy replies, else `-<n>-samples`."""
        return f"-{self.samples}-samples" if self.temperature else ""

    def seed_of(self, place: int) -> int:
        """Seed of the sample at a place among the prompts."""
        return self.seed * 1_000_000_007 + place


def cut_at_stop(text: str, stop: tuple[str, ...], opened: bool = False) -> str:
    """Text up to the end of the first stop string behind its reasoning, or all of it.

    `opened`: the prompt ends inside reasoning.
    """
    for start, end in prompts.spoken(text, opened):
        ends = [at + len(string) for string in stop if (at := text.find(string, start, end)) >= 0]
        if ends:
            return text[: min(ends)]
    return text


def is_reasoning(text: str, opened: bool = False) -> bool:
    """Whether a reply is still inside its reasoning, where no stop string counts."""
    parts = list(prompts.spoken(text, opened))
    return not parts or parts[-1][1] is not None


def opened_by(prompt: list[int], tokenizer: Any) -> bool:
    """Whether a prompt ends inside reasoning."""
    return prompts.opens_reasoning(tokenizer.decode(prompt[-PROMPT_TAIL:]))


def prompt_too_long(prompt: list[int]) -> Reply:
    """The reply to a prompt that leaves no room for one."""
    return Reply("", len(prompt), 0, "prompt_too_long")


def end_ids(*values: int | list[int] | None) -> set[int]:
    """The end tokens among what model and tokenizer call theirs."""
    ends: set[int] = set()
    for value in values:
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends
