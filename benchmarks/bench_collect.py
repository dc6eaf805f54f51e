"""Activations of both models at 7B shapes, written to disk: the project's way against simpler ones, in one run.

    python -m benchmarks.bench_collect [--documents 256] [--layer 17]
    python -m benchmarks.bench_collect --layers 2 --d-model small --documents 12 --device cpu

Random weights in Mistral-7B's shapes, random documents as long as FinQA's, an adapter of rank 512 on q, k, v, o with
random weights. Every way gives the MLP output of the layer for the same documents (the slow ones for fewer of them),
as safetensors on disk:

    the project's               batches by length, stops after the layer, writes while the next batch computes; on a
                                GPU also with the model as it is, without crosscoder/activations/fused.py
    16 prompts a call           in the order of the rows, padded with a mask, stops after the layer, waits for each copy
    one prompt a call           the whole model, waits for each copy

Tokens/s are those that pass through one model; a pair of activations costs two. Each model is timed apart (read twice
for each token, so that as much is written), then both together.

Writes benchmarks/results/collect.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.parts.mistral_7b import SHAPES, random_mistral_7b, random_rows
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from finqa.runtime.errors import report_errors

Way = Callable[..., None]
"""(setup, pair of readers, documents, folder to write)."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
BATCH_TOKENS = 16_384
SHARD_TOKENS = 65_536
PROJECT, SIXTEEN, ONE = "the project's", "16 prompts a call", "one prompt a call, whole model"


def main() -> None:
    args = parse_arguments()
    results = collection(args)
    table = collection_table(results)
    write_record(args.name, results, table, args.output_dir)
    print(table)


@dataclass(frozen=True)
class Setup:
    """What every way reads."""

    model: Any
    """The student with its adapter."""
    target: Any
    width: int
    device: str


def collection(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of every way for the instruct model, the fine-tuned model and both."""
    import torch

    from crosscoder.activations.collection import Document
    from crosscoder.activations.fused import fuse, fuse_adapter
    from crosscoder.activations.readers import Target, adapter_readers, default_reader

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    documents = [Document(row["id"], tuple(row["ids"]), row["n_prompt"]) for row in random_rows(args.documents)]
    base = random_student(args, device)
    model = with_adapter(base, args.rank, device)
    setup = Setup(model, Target(min(args.layer, args.layers), "mlp"), base.config.hidden_size, device)
    ways: dict[str, Any] = {}

    def measure(name: str, way: Way, pair: tuple[Any, Any], n_documents: int) -> None:
        ways[name] = measured(setup, way, pair, documents[: max(2, n_documents)], args.scratch)
        print(name, ways[name], flush=True)

    measure(ONE, one_prompt_a_call, of_both(setup, whole_model), args.documents // 16)
    measure(SIXTEEN, sixteen_prompts_a_call, of_both(setup, masked_model), args.documents // 4)
    hooks = adapter_readers(model, [setup.target], "hooks")
    if device.startswith("cuda"):
        measure(f"{PROJECT}, model as it is", project_way, hooks, args.documents)
        fuse(base)
        fuse_adapter(model)
    measure(f"{PROJECT}, hooks", project_way, hooks, args.documents)
    if default_reader() == "nnsight":
        measure(f"{PROJECT}, nnsight", project_way, adapter_readers(model, [setup.target], "nnsight"), args.documents)
    on_gpu = device.startswith("cuda")
    return {
        "layers": args.layers,
        "d_model": setup.width,
        "layer": setup.target.layer,
        "rank": args.rank,
        "documents": args.documents,
        "tokens": sum(len(document.ids) for document in documents),
        "batch_tokens": BATCH_TOKENS,
        "base_flops_per_token": flops_per_token(base, setup.target.layer),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if on_gpu else None,
        "ways": ways,
    }


def measured(setup: Setup, way: Way, pair: tuple[Any, Any], documents: Sequence[Any], scratch: Path | None) -> Any:
    """Tokens/s through a model, of each model read twice and of both; a few documents go before, untimed."""
    tokens = 2 * sum(len(document.ids) for document in documents)
    instruct, fine_tuned = pair
    pairs = {"instruct": (instruct, instruct), "fine-tuned": (fine_tuned, fine_tuned), "both": pair}
    rates = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        way(setup, pair, documents[-32:], Path(folder) / "before")
    for which, readers in pairs.items():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            started = time.perf_counter()
            way(setup, readers, documents, Path(folder) / "set")
            rates[which] = round(tokens / (time.perf_counter() - started))
    return {"documents": len(documents), "tokens_per_second": rates}


def project_way(setup: Setup, pair: tuple[Any, Any], documents: Sequence[Any], folder: Path) -> None:
    from crosscoder.activations.collection import planned_shards, record, stored_documents, token_table
    from crosscoder.activations.writer import SetWriter

    bos = SHAPES["bos_token_id"]
    shards = planned_shards(documents, bos, SHARD_TOKENS, BATCH_TOKENS)
    writer = SetWriter(folder, setup.width, {})
    writer.prepare()
    record(pair, [setup.target], documents, shards, [writer], bos, setup.device, allow_identical=True)
    sizes = [shard.n_tokens for shard in shards]
    writer.finish(token_table(documents, shards, bos), stored_documents(documents), {}, sizes)


def one_prompt_a_call(setup: Setup, pair: tuple[Any, Any], documents: Sequence[Any], folder: Path) -> None:
    in_batches(setup, pair, documents, folder, 1)


def sixteen_prompts_a_call(setup: Setup, pair: tuple[Any, Any], documents: Sequence[Any], folder: Path) -> None:
    in_batches(setup, pair, documents, folder, 16)


def in_batches(setup: Setup, pair: tuple[Any, Any], documents: Sequence[Any], folder: Path, size: int) -> None:
    """What one would write first: documents as they come, each batch copied to the host before the next one."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    recorded = []
    for start in range(0, len(documents), size):
        rows = [torch.tensor(document.ids) for document in documents[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(setup.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        mask = mask.to(setup.device)
        both = [read(ids, mask)[mask.bool()].to(torch.bfloat16).cpu() for read in pair]
        recorded.append(torch.stack(both, dim=1))
    save_file({"activations": torch.cat(recorded)}, folder / "activations.safetensors")


def of_both(setup: Setup, make: Callable[[Setup], Any]) -> tuple[Any, Any]:
    """The reader that `make` gives, with the adapter switched off and on."""
    read = make(setup)

    def without_adapter(*batch: Any) -> Any:
        with setup.model.disable_adapter():
            return read(*batch)

    return without_adapter, read


def whole_model(setup: Setup) -> Any:
    """Keeps what the layer gave and runs all the model, head included."""
    import torch

    base = setup.model.get_base_model()
    kept: list[Any] = []

    def read(ids: Any, mask: Any) -> Any:
        kept.clear()
        handle = base.model.layers[setup.target.layer - 1].mlp.register_forward_hook(lambda *call: kept.append(call[2]))
        with torch.no_grad():
            base(input_ids=ids, attention_mask=mask, use_cache=False)
        handle.remove()
        return kept[0]

    return read


def masked_model(setup: Setup) -> Any:
    """Stops after the layer; the mask is passed to the model."""
    import torch

    base = setup.model.get_base_model()
    layer = base.model.layers[setup.target.layer - 1].mlp
    kept: list[Any] = []

    class Done(Exception):
        pass

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output)
        raise Done

    def read(ids: Any, mask: Any) -> Any:
        kept.clear()
        handle = layer.register_forward_hook(keep)
        with torch.no_grad(), contextlib.suppress(Done):
            base(input_ids=ids, attention_mask=mask, use_cache=False)
        handle.remove()
        return kept[0]

    return read


def random_student(args: argparse.Namespace, device: str) -> Any:
    """Mistral with random weights: 7B's shapes, or small ones."""
    if args.d_model == "mistral-7b":
        return random_mistral_7b(args.layers, device)
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shapes: dict[str, Any] = {**SHAPES, **SMALL, "num_hidden_layers": args.layers}
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(MistralConfig(**shapes))
    return model.to(device).eval()


def with_adapter(base: Any, rank: int, device: str) -> Any:
    """The model with a random adapter that changes it, in the model's dtype."""
    import torch
    from peft import LoraConfig, get_peft_model

    from crosscoder.activations.readers import in_the_models_dtype

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, init_lora_weights=False)
    torch.manual_seed(1)
    with torch.device(device):
        model = get_peft_model(base, settings).eval()
    in_the_models_dtype(model, base.dtype)
    return model


def flops_per_token(base: Any, layer: int) -> int:
    """Of the products with the base's weights up to the layer's MLP; attention and adapter come on top."""
    return 2 * sum(
        p.numel() for block in base.model.layers[:layer] for n, p in block.named_parameters() if "lora" not in n
    )


def collection_table(results: dict[str, Any]) -> str:
    reference = results["ways"][ONE]["tokens_per_second"]["both"]
    rows = []
    for name, way in results["ways"].items():
        rates = way["tokens_per_second"]
        figures = [f"{rates[which]:,}" for which in ("instruct", "fine-tuned", "both")]
        tflops = rates["instruct"] * results["base_flops_per_token"] / 1e12
        rows.append((name, way["documents"], *figures, f"{rates['both'] / reference:.1f}", f"{tflops:.2f}"))
    header = ("tokens/s through a model, written to disk", "documents", "instruct", "fine-tuned", "both in turn",
              "times one a call", "instruct, TFLOP/s")  # fmt: skip
    return markdown_table(header, rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, default=256, help="that the project's way reads (default: %(default)s)")
    add("--layers", type=int, default=32, help="of the model (default: %(default)s)")
    add("--d-model", choices=("mistral-7b", "small"), default="mistral-7b", help="shapes (default: %(default)s)")
    add("--layer", type=int, default=17, help="whose MLP output is read (default: %(default)s)")
    add("--rank", type=int, default=512, help="of the adapter (default: %(default)s)")
    add("--device", help="(default: a GPU where there is one)")
    add("--scratch", type=Path, help="folder for the sets, which are deleted (default: the system's)")
    add("--name", default="collect", help="of the record (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(report_errors(main))
