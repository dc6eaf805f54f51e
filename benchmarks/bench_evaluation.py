"""How fast replies are generated: the project's engine against vLLM alone, on the same prompts in one process.

    python -m benchmarks.bench_evaluation                 # one GPU, Mistral-7B's shapes
    python -m benchmarks.bench_evaluation --lora          # the same with the adapter (r 512) by request
    python -m benchmarks.bench_evaluation --small         # pocket-mistral's shapes, on a CPU too

Random weights in the real shapes, prompts of random tokens as long as FinQA's, replies of a fixed length. On one
engine: all prompts at once through finqa.evaluation.engines, as main.py asks them; all prompts in one call of
LLM.generate; and, through finqa.evaluation.engines again, eight prompts a call, on the first
--call-prompts of them (a rate is compared).

What would falsify the comparison, and what is done about it: a prompt that was read before costs nothing, so the
prefix cache is emptied before every run and vLLM's own count of cached tokens must be 0; the first run pays for what is
made at first use, so other prompts are asked before; a machine gets slower or faster, so the order turns round with
every repeat; replies of other lengths are other work, so a run with any other number of tokens is refused.

No weights, no tokenizer and no network are needed. After --budget-s seconds no further run is begun, and the record is
written after each, so a run that is cut short has what was measured. Writes benchmarks/results/evaluation*.json, .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.parts.made_up_model import write_random_adapter, write_weightless_mistral
from benchmarks.parts.mistral_7b import SHAPES, finqa_like_lengths
from benchmarks.parts.record import RESULTS, markdown_table, summary, write_record
from finqa.evaluation.engines.vllm_engine import EngineArguments, vllm_engine, vllm_generate
from finqa.evaluation.generation import Generate, GenerationConfig
from finqa.models.settings import DEFAULTS
from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import SHIPPED_DATA

ALONE, PROJECT, CALLS, BASE = (
    "vLLM alone",
    "project, all at once",
    "project, calls of 8",
    "project, without the adapter",
)
CALL = 8
CACHE_TRIES = 20
LOWEST_TOKEN = 300
"""Prompts are of tokens from here on: above the special ones and the single bytes."""


@dataclass
class Runs:
    """What one way of asking was measured at."""

    prompts: int
    tokens_in: int
    tokens_out: int
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    engine: Any
    config: GenerationConfig
    adapter: Path | None


Way = Callable[[Sequence[list[int]]], list[int]]
"""Asks prompts; returns the number of new tokens of each reply, in their order."""


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    runs: dict[str, Runs] = {}
    with tempfile.TemporaryDirectory() as scratch, started_engine(args, Path(scratch)) as (setup, facts):
        prompts = random_prompts(args, args.prompts, seed=0)
        ways = ways_of(setup)
        ways[ALONE](random_prompts(args, min(args.prompts, args.warm_up), seed=1))
        for name in order(list(ways), args.repeats):
            if runs and time.monotonic() - started > args.budget_s:
                print(f"{args.budget_s} s are over: no further run", flush=True)
                break
            asked = prompts[: args.call_prompts] if name == CALLS else prompts
            seconds, counts = timed(setup, ways[name], asked)
            runs.setdefault(name, Runs(len(asked), sum(map(len, asked)), sum(counts))).seconds.append(round(seconds, 3))
            print(f"{name}: {len(asked)} prompts in {seconds:.2f} s", flush=True)
            table = report(runs, facts, args)
    print(table)


@contextmanager
def started_engine(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[Setup, dict[str, Any]]]:
    """The engine of main.py, but for its weights."""
    shapes = shapes_of(args)
    model = str(write_weightless_mistral(scratch / "model", shapes))
    adapter = write_random_adapter(scratch / "adapter", shapes, args.lora_r, 2 * args.lora_r) if args.lora else None
    config = GenerationConfig(vllm=True, max_new_tokens=args.new_tokens, batch_size=1)
    arguments = EngineArguments(model, model, False, config, adapter, random_weights=True)
    with vllm_engine(arguments) as (engine, facts):
        yield Setup(engine, config, adapter), facts


def shapes_of(args: argparse.Namespace) -> dict[str, Any]:
    if args.small:
        return json.loads((SHIPPED_DATA / "models" / "pocket-mistral" / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return {**SHAPES, "num_hidden_layers": args.layers, "rope_parameters": rope}


def random_prompts(args: argparse.Namespace, count: int, seed: int) -> list[list[int]]:
    """Token ids of prompts as long as FinQA's pages; no two begin alike but for their first token."""
    rng, size = Random(seed), shapes_of(args)["vocab_size"]
    lengths = finqa_like_lengths(count, args.tokens_in, seed)
    return [[1, *(rng.randrange(LOWEST_TOKEN, size) for _ in range(length - 1))] for length in lengths]


def ways_of(setup: Setup) -> dict[str, Way]:
    """With an adapter: with and without it. Else: all at once and in calls of eight."""
    ways: dict[str, Way] = {ALONE: alone(setup), PROJECT: by_project(setup, setup.adapter)}
    if setup.adapter:
        return ways | {BASE: by_project(setup, None)}
    return ways | {CALLS: in_calls(by_project(setup, None))}


def order(ways: list[str], repeats: int) -> list[str]:
    """vLLM alone and the project in turns, the first of a round being the last of the one before; the rest once, after
    the first round, so that a run that is cut short has every way."""
    main, rest = ways[:2], ways[2:]
    rounds = [main if repeat % 2 == 0 else main[::-1] for repeat in range(repeats)]
    return [*rounds[0], *rest, *(name for later in rounds[1:] for name in later)]


def alone(setup: Setup) -> Way:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    request = LoRARequest("student", 1, str(setup.adapter)) if setup.adapter else None
    sampling = SamplingParams(temperature=0.0, max_tokens=setup.config.max_new_tokens, ignore_eos=True)

    def ask(prompts: Sequence[list[int]]) -> list[int]:
        asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = setup.engine.generate(asked, sampling, use_tqdm=False, lora_request=request)
        if cached := sum(output.num_cached_tokens or 0 for output in outputs):
            raise UserError(f"{ALONE} found {cached} tokens in the prefix cache; the comparison is void")
        return [len(output.outputs[0].token_ids) for output in outputs]

    return ask


def by_project(setup: Setup, adapter: Path | None) -> Way:
    generate: Generate = vllm_generate(setup.engine, set(), setup.config, adapter)

    def ask(prompts: Sequence[list[int]]) -> list[int]:
        replies = dict(generate(prompts))
        return [replies[place].n_new_tokens for place in range(len(prompts))]

    return ask


def in_calls(ask: Way) -> Way:
    def ask_in_calls(prompts: Sequence[list[int]]) -> list[int]:
        calls = [prompts[start : start + CALL] for start in range(0, len(prompts), CALL)]
        return [count for call in calls for count in ask(call)]

    return ask_in_calls


def timed(setup: Setup, ask: Way, prompts: Sequence[list[int]]) -> tuple[float, list[int]]:
    """Seconds and new tokens of one run on an empty prefix cache. Raises UserError where replies end early."""
    empty_cache(setup.engine)
    started = time.perf_counter()
    counts = ask(prompts)
    seconds = time.perf_counter() - started
    if short := sum(count != setup.config.max_new_tokens for count in counts):
        raise UserError(f"{short} of {len(counts)} replies do not have {setup.config.max_new_tokens} tokens")
    return seconds, counts


def empty_cache(engine: Any) -> None:
    for _ in range(CACHE_TRIES):  # blocks of the last replies may still be on their way back
        if engine.reset_prefix_cache():
            return
        time.sleep(0.1)
    raise UserError("the engine does not empty its prefix cache; the comparison would be void")


def report(runs: dict[str, Runs], facts: dict[str, Any], args: argparse.Namespace) -> str:
    """Write the record of what was measured so far; returns its table."""
    ways: dict[str, Any] = {}
    for name, of_way in runs.items():
        seconds = summary(of_way.seconds)
        ways[name] = {
            "prompts": of_way.prompts,
            "tokens_in": of_way.tokens_in,
            "tokens_out": of_way.tokens_out,
            "seconds": seconds,
            "prompts_per_second": round(of_way.prompts / seconds["median"], 2),
        }
    alone = ways.get(ALONE, {}).get("prompts_per_second")
    rows = []
    for name, way in ways.items():
        way["rate_against_vllm_alone"] = round(way["prompts_per_second"] / alone, 3) if alone else None
        s = way["seconds"]
        rows.append(
            (
                name, f"{way['prompts']:,}", f"{way['tokens_in']:,}", f"{way['tokens_out']:,}",
                f"{s['median']:.1f} ({s['lowest']:.1f} to {s['highest']:.1f}, n {s['repeats']})",
                f"{way['prompts_per_second']:.1f}", way["rate_against_vllm_alone"],
            )
        )  # fmt: skip
    head = ("way", "prompts", "tokens in", "tokens out", "seconds, median (range)", "prompts/s", "rate / vLLM alone")
    table = markdown_table(head, rows)
    settings = {
        "shapes": "pocket-mistral" if args.small else f"Mistral-7B, {args.layers} layers",
        "lora_r": args.lora_r if args.lora else None,
        "warm_up_prompts": args.warm_up,
        "engine": facts,
    }
    name = "evaluation" + ("_small" if args.small else "") + ("_lora" if args.lora else "")
    write_record(name, {**settings, "ways": ways}, table, args.output_dir)
    return table


FULL = {"prompts": 1104, "tokens_in": 1_270_000 / 1104, "new_tokens": 131, "call_prompts": 368, "warm_up": 128,
        "lora_r": DEFAULTS.lora_r, "repeats": 2}  # fmt: skip
SMALL = {"prompts": 400, "tokens_in": 260, "new_tokens": 60, "call_prompts": 400, "warm_up": 32, "lora_r": 8,
         "repeats": 4}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", action="store_true", help="pocket-mistral's shapes and its data's lengths")
    add("--lora", action="store_true", help="with an adapter by request (on a CPU minutes: vLLM is slow there)")
    add("--prompts", type=int, help="default: 1,104; small: 400")
    add("--tokens-in", type=float, help="of a prompt, on average (default: 1,150; small: 260)")
    add("--new-tokens", type=int, help="of every reply (default: 131; small: 60)")
    add("--call-prompts", type=int, help="that are asked in calls of 8 (default: 368; small: 400)")
    add("--warm-up", type=int, help="other prompts that are asked first (default: 128; small: 32)")
    add("--lora-r", type=int, help="rank of the adapter (default: 512; small: 8)")
    add("--repeats", type=int, help="of vLLM alone and of the project (default: 2; small: 4)")
    add("--layers", type=int, default=SHAPES["num_hidden_layers"], help="of the 7B shapes (default: %(default)s)")
    add("--budget-s", type=float, default=400, help="no run is begun after so many seconds (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    args = parser.parse_args()
    for name, value in (SMALL if args.small else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
