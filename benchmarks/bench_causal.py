"""Patches at 7B shapes: speed and memory of the causal figure, against running whole models for every patch.

    python -m benchmarks.bench_causal [--documents 32] [--layer 17] [--latents 16384]
    python -m benchmarks.bench_causal --shapes 1.5b
    python -m benchmarks.bench_causal --small

Random weights in Mistral-7B's shapes, or in those of Qwen2.5-1.5B, with a random adapter of rank 512, random documents
as long as FinQA's, a random dictionary. Measured in one run:

    teacher-forced      time of a document and patch: as analyse.py --causal measures them; on a GPU by layers that are
                        not fused (activations/fused.py; all that is measured after it is by fused ones); in batches of
                        2,048 tokens; the lower halves run again for each patch; and by whole models with hooks, a
                        document and a patch at a time, logits at every token. How far the numbers of the first are from
                        the last's
    ceilings            the same for whole-site patches of a few layers, and by whole models with a hook
    generation          new tokens/s of a patched and of a steered model, and of the unpatched ones, same prompts

A patch that reads both models cannot be faster than 1 / (1 + layer / layers) of plain generation on one device, as the
other model runs as far as the site; a latent that is turned up takes one model, and can be as fast.

Generation is timed --repeats times, all ways in turn, and the medians are kept. Without a GPU all times are seconds of
CPU, which say more than the clock where other work shares the machine.

--small is the same code on small shapes, on the CPU. --model FOLDER takes a real model, with a random adapter. Writes
benchmarks/results/causal.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_collect import SMALL, with_adapter
from benchmarks.parts.generation import generation
from benchmarks.parts.mistral_7b import SHAPES, random_mistral_7b, random_rows
from benchmarks.parts.plain_patches import nats_from_whole_models, plain_ceilings, plain_patches
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from benchmarks.parts.timing import peak_memory_gb, synchronise
from crosscoder.names import default_layer
from finqa.runtime.errors import report_errors

BOS = 1
QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
"""Where Qwen2.5-1.5B differs from Mistral-7B, beside its 28 layers."""
PLAIN = ("generation, base", "generation, fine-tuned")


def main() -> None:
    args = parse_arguments()
    results = measured(args)
    table = causal_table(results)
    write_record(args.name, results, table, args.output_dir)
    print(table)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and tokens/s of every way, and the most memory that was in use."""
    import torch

    from crosscoder.activations.fused import fuse, fuse_adapter
    from crosscoder.activations.readers import Target
    from crosscoder.interventions.halves import pair_of

    model = with_adapter(random_student(args), args.rank, args.device)
    model.get_base_model().generation_config.eos_token_id = None  # so that no reply ends before the limit
    pair, target = pair_of(model), Target(args.layer, "mlp")
    documents = shortened(random_documents(args.documents), args)
    dictionary = random_dictionary(args, model.get_base_model().config.hidden_size, pair, documents, target)
    ways: dict[str, Any] = {}

    def keep(name: str, unit: str, run: Callable[[], float]) -> None:
        value = run()
        ways[name] = {"unit": unit, "value": value, "peak_memory_gb": peak_memory_gb()}
        print(name, ways[name], flush=True)

    ms = "ms a document and patch"
    cells, at_once = patches(dictionary, args), args.batch_tokens
    if args.device.startswith("cuda"):
        keep("teacher-forced, not fused", ms, lambda: teacher_forced(pair, target, documents, cells, args, at_once))
        fuse(model.get_base_model())
        fuse_adapter(model)
    keep("teacher-forced", ms, lambda: teacher_forced(pair, target, documents, cells, args, at_once))
    keep("teacher-forced, 2,048 tokens", ms, lambda: teacher_forced(pair, target, documents, cells, args, 2_048))
    alone = (cells[:1], cells[-1:])
    keep("teacher-forced, each alone", ms, lambda: teacher_forced(pair, target, documents, alone, args, at_once))
    few, some = documents[: max(1, len(documents) // 8)], [*cells[:4], cells[-1]]
    keep("teacher-forced, whole models", ms, lambda: plainly(pair, target, few, some, args))
    layers = sorted({1, args.layer, args.layers})
    keep("ceilings", ms, lambda: whole_sites(model, documents, layers, args))
    keep("ceilings, whole models", ms, lambda: plain_whole_sites(pair, documents, layers, args))
    rates = generation(pair, target, documents, cells[-1], dictionary, args)
    unit = "new tokens/s" if args.device.startswith("cuda") else "new tokens a CPU second"
    for name, rate in rates.items():
        keep(name, unit, lambda rate=rate: rate)
    return {
        "layers": args.layers,
        "layer": args.layer,
        "d_model": dictionary.config.d_model,
        "latents": args.latents,
        "documents": len(documents),
        "tokens": sum(len(d.ids) for d in documents),
        "patches": len(cells),
        "nats_from_whole_models": nats_from_whole_models(pair, target, few, some),
        "new_tokens": args.new_tokens,
        "mean_active_latents": active_latents(dictionary, reading_of_first(pair, documents[:2], target)),
        "torch_threads": torch.get_num_threads(),
        "ways": ways,
    }


def random_documents(count: int) -> list[Any]:
    from crosscoder.activations.collection import Document

    return [Document(row["id"], tuple(row["ids"]), row["n_prompt"]) for row in random_rows(count)]


def shortened(documents: Sequence[Any], args: argparse.Namespace) -> list[Any]:
    """BOS and their ends, in the model's vocabulary, where --small asks for less."""
    from crosscoder.activations.collection import Document

    made = []
    for d in documents:
        cut = max(0, len(d.ids) - args.longest)
        ids = tuple(3 + token % (args.vocabulary - 3) for token in d.ids[cut + 1 :])
        made.append(Document(d.id, (BOS, *ids), d.n_prompt - cut))
    return made


def random_student(args: argparse.Namespace) -> Any:
    """Mistral with random weights: 7B's shapes, or small ones with a small vocabulary; or a real model."""
    if args.model:
        from transformers import AutoModelForCausalLM

        dtype = "auto" if args.device.startswith("cuda") else "float32"
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    if not args.small:
        return random_mistral_7b(args.layers, args.device, **(QWEN_1_5B if args.shapes == "1.5b" else {}))
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shapes: dict[str, Any] = {**SHAPES, **SMALL, "num_hidden_layers": args.layers, "vocab_size": args.vocabulary}
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(MistralConfig(**shapes))
    return model.to(args.device).eval()


def random_dictionary(args: argparse.Namespace, width: int, pair: Any, documents: Sequence[Any], target: Any) -> Any:
    """A crosscoder of random directions, its threshold such that about 100 latents (or an eighth) are active."""
    import torch

    from crosscoder.dictionaries.config import CrosscoderConfig
    from crosscoder.dictionaries.methods import new_dictionary

    k = min(100, args.latents // 8)
    generator = torch.Generator().manual_seed(0)
    dictionary = new_dictionary(CrosscoderConfig(width, args.latents, k), generator=generator, directions="apart")
    dictionary = dictionary.to(args.device).requires_grad_(False)
    dictionary.threshold = 0.0
    reading = reading_of_first(pair, documents[:2], target)
    scores = dictionary.activations(dictionary.scale(reading.pairs)) * dictionary.selection_norms()
    dictionary.threshold = float(torch.topk(scores.flatten(), k * len(scores)).values[-1])
    return dictionary


def reading_of_first(pair: Any, documents: Sequence[Any], target: Any) -> Any:
    from crosscoder.interventions.patching import batch_of, run_halves
    from crosscoder.interventions.ranking import reading_of

    return reading_of(run_halves(pair, batch_of(documents, device=pair.instruct.device), [target.layer]), target)


def active_latents(dictionary: Any, reading: Any) -> float:
    return round(float((reading.values(dictionary) > 0).sum(dim=-1).float().mean()), 1)


def patches(dictionary: Any, args: argparse.Namespace) -> list[Any]:
    """Nothing, the whole site, sets of rising size, random directions; the last is a set of 64."""
    from crosscoder.interventions.causal import Cell
    from crosscoder.interventions.sets import Latents, Nothing, RandomDirections, Whole, sizes_to

    additions: list[Any] = [Nothing(), Whole()]
    for size in sizes_to(args.latents):
        additions += [Latents(dictionary, range(size)), RandomDirections(dictionary, range(size), 0)]
    return [Cell(addition) for addition in [*additions, Latents(dictionary, range(64), "last")]]


def teacher_forced(
    pair: Any,
    target: Any,
    documents: Sequence[Any],
    cells: Sequence[Any],
    args: argparse.Namespace,
    at_once: int | None,
) -> float:
    """Cells in a list of their own are measured by themselves."""
    from crosscoder.interventions.causal import Cell, measure

    groups = [cells] if isinstance(cells[0], Cell) else cells
    measure(pair, target, documents[:2], groups[0][:1], batch_tokens=at_once)
    started = clock(args.device)
    for group in groups:
        measure(pair, target, documents, group, batch_tokens=at_once)
    return ms_each(started, args.device, len(documents) * sum(map(len, groups)))


def plainly(pair: Any, target: Any, documents: Sequence[Any], cells: Sequence[Any], args: argparse.Namespace) -> float:
    started = clock(args.device)
    plain_patches(pair, target, documents, cells)
    return ms_each(started, args.device, len(documents) * len(cells))


def whole_sites(model: Any, documents: Sequence[Any], layers: Sequence[int], args: argparse.Namespace) -> float:
    from crosscoder.activations.readers import Target
    from study.site_ceilings import ceilings

    targets = [Target(layer, site) for layer in layers for site in ("attention", "mlp", "residual")]
    started = clock(args.device)
    found = ceilings(model, None, documents, targets)
    return ms_each(started, args.device, len(documents) * len(found))


def plain_whole_sites(pair: Any, documents: Sequence[Any], layers: Sequence[int], args: argparse.Namespace) -> float:
    few = documents[: max(1, len(documents) // 8)]
    started = clock(args.device)
    return ms_each(started, args.device, plain_ceilings(pair, few, layers))


def clock(device: str) -> float:
    synchronise()
    return time.perf_counter() if device.startswith("cuda") else time.process_time()


def ms_each(started: float, device: str, count: int) -> float:
    return round(1000 * (clock(device) - started) / count, 3)


def causal_table(results: dict[str, Any]) -> str:
    ways = results["ways"]
    rows = []
    for ours, theirs in (
        *(("teacher-forced", name) for name in ways if name.startswith("teacher-forced, ")),
        ("ceilings", "ceilings, whole models"),
        *((name, plain) for name in ways for plain in PLAIN if name.startswith(f"{plain} ")),
    ):
        if ours not in ways:
            continue
        a, b = ways[ours]["value"], ways[theirs]["value"]
        faster = a / b if "tokens" in ways[ours]["unit"] else b / a
        memory = ways[ours]["peak_memory_gb"]
        rows.append((ours, theirs, ways[ours]["unit"], f"{a:,.1f}", f"{b:,.1f}", f"{faster:.2f}", memory or "-"))
    header = ("way", "against", "unit", "way", "against", "times as fast", "peak GB of the way")
    return markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", action="store_true", help="small shapes, few short documents, on the CPU")
    add("--shapes", choices=("7b", "1.5b"), default="7b", help="(default: %(default)s)")
    add("--model", type=Path, metavar="FOLDER", help="a real model")
    add("--repeats", type=int, default=3, help="of generation (default: %(default)s)")
    add("--documents", type=int, help="(default: 32; with --small 4)")
    add("--layers", type=int, help="of the model (default: 32; with --small 4)")
    add("--layer", type=int, help="whose MLP output is patched (default: 17; with --small 2)")
    add("--latents", type=int, help="(default: 16384; with --small 128)")
    add("--rank", type=int, help="of the adapter (default: 512; with --small 4)")
    add("--new-tokens", type=int, help="of each reply (default: 128; with --small 8)")
    add("--generation-batch", type=int, default=16, help="prompts in a batch (default: %(default)s)")
    add("--batch-tokens", type=int, help="teacher-forced, padded (default: as analyse.py --causal)")
    add("--device", help="(default: a GPU where there is one; with --small the CPU)")
    add("--name", default="causal", help="of the record (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    small = {"documents": 4, "layers": 4, "layer": 2, "latents": 128, "rank": 4, "new_tokens": 8}
    whole = {"documents": 32, "layers": 32, "layer": 17, "latents": 16_384, "rank": 512, "new_tokens": 128}
    if args.shapes == "1.5b":
        whole |= {"layers": 28, "layer": default_layer(28)}
    if args.model:
        shape = json.loads((args.model / "config.json").read_text())
        args.layers, vocabulary = shape["num_hidden_layers"], shape["vocab_size"]
        whole |= {"layer": default_layer(args.layers), "rank": 8}
    for name, value in (small if args.small else whole).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.vocabulary = vocabulary if args.model else 1_024 if args.small else SHAPES["vocab_size"]
    args.longest = 256 if args.small or args.model else sys.maxsize
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() and not args.small else "cpu"
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
