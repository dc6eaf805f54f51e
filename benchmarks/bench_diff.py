"""The whole model diff at 7B shapes, stage by stage: collect 1,024 documents on both models, train, analyse.

    python -m benchmarks.bench_diff                                 on one GPU
    python -m benchmarks.bench_diff --preset published              one pass by the published run's settings
    python -m benchmarks.bench_diff --small --documents 12          the same code on a CPU

Random weights in Mistral-7B's shapes, an adapter of rank 512 with random weights, random documents as long as FinQA's
(1,147 tokens on average; --mean-tokens), MLP output of layer 17. Training is that of train.py with the settings that it
takes for so many activations where no flag says otherwise (crosscoder/training/sizing.py: they are in the record), or
one pass with the published run's. The analysis is that of train.py: every latent's statistics over the training tokens,
explained variance on training and held-out documents, classes, latent scaling. What is measured is time alone: the
activations of random weights have no features to find.

Loading the model is timed and not part of the total: here weights are made, there they are read. The most that each
stage took of the GPU is recorded, with what was held before it: the model, the set where it is on the GPU.
The target is 3 minutes for the total; the published run took 136.

Writes benchmarks/results/diff.json and .md after every stage.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.bench_collect import Setup, project_way, random_student, with_adapter
from benchmarks.parts.mistral_7b import TRAIN_ROWS, TRAIN_TOKENS, finqa_like_lengths
from benchmarks.parts.record import RESULTS, markdown_table, write_record
from benchmarks.parts.timing import peak_memory_gb, synchronise
from finqa.runtime.errors import report_errors

if TYPE_CHECKING:
    from crosscoder.activations.collection import Document
    from crosscoder.activations.store import ActivationStore

TARGET_S = 180.0
LAYER = 17
STAGES = ("collect", "open the set", "train", "analyse")


class Diff:
    """What is measured, written down after every stage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.seconds: dict[str, float] = {}
        self.peak_gb: dict[str, float | None] = {}
        self.facts: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k != "output_dir"}}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        peak_memory_gb()
        started = time.perf_counter()
        yield
        synchronise()
        self.seconds[name], self.peak_gb[name] = round(time.perf_counter() - started, 2), peak_memory_gb()
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)
        self.write()

    def write(self) -> str:
        total = sum(self.seconds.get(name, 0.0) for name in STAGES)
        rows = [
            (name, f"{seconds:.1f}", self.peak_gb[name] or "-", self.facts.get(name, ""))
            for name, seconds in self.seconds.items()
        ]
        rows.append(("total, model loaded", f"{total:.1f}", "", f"{total / TARGET_S:.2f} of the target of 3 minutes"))
        table = markdown_table(("stage", "s", "peak GB", ""), rows)
        record = {"seconds": self.seconds, "peak_gb": self.peak_gb, "total_s": round(total, 2), **self.facts}
        write_record(self.args.name, record, table, self.args.output_dir)
        return table


def main() -> None:
    args = parse_arguments()
    diff = Diff(args)
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        collect(diff, args, Path(folder) / "activations")
        train_and_analyse(diff, args, Path(folder))
    print(diff.write())


def collect(diff: Diff, args: argparse.Namespace, folder: Path) -> None:
    """Activations of both models, on disk; the model is gone afterwards."""
    import torch

    from crosscoder.activations.fused import fuse, fuse_adapter
    from crosscoder.activations.readers import Target, adapter_readers

    shapes = SimpleNamespace(d_model="small" if args.small else "mistral-7b", layers=args.layers)
    with diff.stage("make the model"):
        base = random_student(shapes, args.device)  # pyright: ignore[reportArgumentType]
        model = with_adapter(base, 8 if args.small else 512, args.device)
        if args.device.startswith("cuda"):
            fuse(base)
            fuse_adapter(model)
    setup = Setup(model, Target(min(LAYER, args.layers), "mlp"), base.config.hidden_size, args.device)
    documents = made_up_documents(args.documents, args.mean_tokens, base.config.vocab_size)
    tokens = sum(len(document.ids) for document in documents)
    diff.facts["tokens"] = tokens
    with diff.stage("collect"):
        project_way(setup, adapter_readers(model, [setup.target], "hooks"), documents, folder)
    rate = 2 * tokens / diff.seconds["collect"]
    diff.facts["collect"] = f"{tokens:,} tokens on both models, {rate:,.0f} tokens/s through a model"
    del base, model, setup
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train_and_analyse(diff: Diff, args: argparse.Namespace, folder: Path) -> None:
    import torch

    from crosscoder.activations.store import ActivationStore
    from crosscoder.dictionaries.methods import new_dictionary
    from crosscoder.training.report import crosscoder_report
    from crosscoder.training.sizing import PUBLISHED, sized_configs
    from crosscoder.training.trainer import Trainer

    with diff.stage("open the set"):
        store: ActivationStore = ActivationStore(folder / "activations", device=args.device)
        diff.facts["open the set"] = f"{store.size_bytes / 1e9:.2f} GB, in {store.place}"
    given: dict[str, Any] = PUBLISHED if args.preset == "published" else {}
    if args.small:
        given = given | {"n_latents": 256, "k": 8, "batch_size": 512, "epochs": 4.0}
    n_train = len(store.split(0.1, 0).train)
    crosscoder, training = sized_configs(store.config.d_model, n_train, **given)
    diff.facts |= {"crosscoder": asdict(crosscoder), "training": asdict(training)}
    with diff.stage("train"):
        generator = torch.Generator().manual_seed(training.seed)
        model = new_dictionary(crosscoder, training.decoder_norm, generator, training.directions)
        run = Trainer(model, store, training, folder / "crosscoder", device=args.device)
        run.fit()
        diff.facts["train"] = (
            f"{run.total_steps:,} steps of {training.batch_size:,} tokens, {crosscoder.n_latents:,} latents, "
            f"k {crosscoder.k}, {training.epochs:g} passes"
        )
    split = run.split
    del run  # a step by hand holds copies of the weights
    with diff.stage("analyse"):
        report = crosscoder_report(model, store, split, [])
        diff.facts["analyse"] = f"{len(split.train):,} training and {len(split.held_out):,} held-out tokens"
        diff.facts["held_out"] = report.held_out._asdict()


def made_up_documents(count: int, mean_tokens: float, vocabulary: int) -> list[Document]:
    """Random tokens, as long as FinQA's prompts and programs in distribution."""
    from random import Random

    from crosscoder.activations.collection import Document

    rng = Random(0)
    documents = []
    for number, length in enumerate(finqa_like_lengths(count, mean_tokens)):
        ids = (1, *(rng.randrange(3, vocabulary) for _ in range(max(8, length) - 1)))
        documents.append(Document(f"row-{number}", ids, max(2, len(ids) - 100)))
    return documents


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=int, default=1024)
    add("--mean-tokens", type=float, help="of a document (default: FinQA's, 1,147; with --small 100)")
    add("--layers", type=int, help="of the model (default: 32, with --small 2)")
    add("--preset", choices=("published",), help="settings of the published run")
    add("--small", action="store_true", help="small shapes, for a CPU")
    add("--device", help="(default: a GPU where there is one)")
    add("--scratch", type=Path, help="folder for what the stages write, which is deleted (default: the system's)")
    add("--name", default="diff", help="of the record (default: %(default)s)")
    add("--output-dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.mean_tokens = args.mean_tokens or (100.0 if args.small else TRAIN_TOKENS / TRAIN_ROWS)
    args.layers = args.layers or (2 if args.small else 32)
    if args.device is None:
        from finqa.models.students import default_device

        args.device = default_device()
    return args


if __name__ == "__main__":
    sys.exit(report_errors(main))
