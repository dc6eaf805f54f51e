"""Rates of generation of both models of a pair: as they are, steered, ablated, patched."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from benchmarks.parts.timing import synchronise


def generation(
    pair: Any, target: Any, documents: Sequence[Any], cell: Any, dictionary: Any, args: argparse.Namespace
) -> dict[str, float]:
    """Tokens/s of each way: both models as they are, then steered by one latent, ablated, patched by a set."""
    import torch

    from crosscoder.interventions.patched_generation import patched
    from crosscoder.interventions.steering import steered

    known = (pair, target, dictionary, torch.ones(2, args.latents))
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "generation, base": lambda: opened(pair.instruct),
        "generation, fine-tuned": lambda: opened(pair.fine_tuned),
        "generation, base steered": lambda: steered(*known, "base", {3: 1.0}),
        "generation, fine-tuned steered": lambda: steered(*known, "fine-tuned", {3: 1.0}),
        "generation, fine-tuned ablated": lambda: steered(*known, "fine-tuned", {}, [3]),
        "generation, base patched": lambda: patched(pair, target, cell._replace(carrier="own")),
        "generation, base patched below the fine-tuned": lambda: patched(pair, target, cell),
    }
    with ways["generation, base"]() as model:
        written(model, documents, args, 2)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            with way() as model:
                rates[name].append(written(model, documents, args, args.new_tokens))
    return {name: round(statistics.median(found), 1) for name, found in rates.items()}


@contextmanager
def opened(side: Any) -> Iterator[Any]:
    with side.active():
        yield side.model


def written(model: Any, documents: Sequence[Any], args: argparse.Namespace, n: int) -> float:
    """New tokens/s of transformers' generate; a CPU second where there is no GPU."""
    import torch

    prompts = [list(d.ids[: d.n_prompt]) for d in documents[: args.generation_batch]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=args.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=args.device)
    clock = time.perf_counter if args.device.startswith("cuda") else time.process_time
    synchronise()
    started = clock()
    with torch.inference_mode():
        rows = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, do_sample=False, pad_token_id=0)
    synchronise()
    return rows[:, longest:].numel() / (clock() - started)
