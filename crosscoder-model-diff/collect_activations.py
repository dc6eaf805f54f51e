"""Record the activations of a base model and its fine-tuned form over the same tokens.

    python collect_activations.py                                     FinQA, Mistral-7B-Instruct-v0.3, layer 17
    python collect_activations.py FinQA-mini pocket-mistral --no-push
    python collect_activations.py FinQA mistralai/Mistral-7B-Instruct-v0.3 HF_NAME --layer 9 17 --site mlp residual
    python collect_activations.py --base MODEL --fine-tuned MODEL --text FILE [--name NAME]
    torchrun --nproc-per-node 8 collect_activations.py ...             a share of the documents for each GPU

The fourth line is for any two causal language models with one tokenizer, and any texts (docs/model-diff.md): no data
set and no student is needed, and every later script takes the pair's name in their place.

Reads the filtered rows of a split or of all (prompt and program, as the very token ids the student was trained on),
the base model, and the adapter: from D/models/<dataset>/<model-id>/, else from the Hub. One model is in memory, its
adapter switched off for index 0 (instruct) and on for index 1 (fine-tuned); with --merged a second one, the merged
model. --against RUN_NAME puts another fine-tune of that base in index 0, so that two fine-tunes are compared.
Several layers and sites are read in one pass of each model, which runs up to the last of them and no further.
Padding is never recorded, BOS only with --keep-bos. Tokens of more than ten times
the median norm (attention sinks) are counted, and left out of every reading unless --keep-outliers is given.

Writes D/activations/<model-id>-<dataset>-<split>-layer<L>-<site>-<n>/ for each layer and site: shards, token table,
config.json with the activation scales, and run.json. A set that is there and was made from the same inputs is left as
it is. A killed run goes on with the shards that are missing, and gives the bytes that it would have given; so do
several processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from crosscoder.cards import write_activations_card
from crosscoder.names import (
    ActivationChoice,
    add_activation_flags,
    choices_from_args,
)
from crosscoder.own_pair import PLACES, OwnPair, portable
from crosscoder.repositories import add_push_flags, hub_id, require_push
from finqa.models import hub, students
from finqa.models.adapters import is_adapter
from finqa.models.templates import template_facts
from finqa.models.weights import check_base
from finqa.runtime import parallel
from finqa.runtime.command_line import add_flags, flag, from_args, script_parser, settings_of
from finqa.runtime.errors import report_errors
from finqa.runtime.journal import only_run_on
from finqa.runtime.manifest import write_json, write_manifest
from finqa.runtime.memory.free import free_memory, memory_used
from finqa.runtime.paths import Folders
from finqa.runtime.progress import Progress

if TYPE_CHECKING:
    from crosscoder.activations.collection import Document, Shard
    from crosscoder.activations.readers import Read, Target
    from crosscoder.activations.writer import SetWriter

BATCH_TOKENS = {"cuda": 16_384, "cpu": 4096}
"""Large products are what makes a GPU fast; a CPU gains nothing from more."""
INSTRUCT_ADAPTER = "instruct"


@dataclass(frozen=True)
class Recording:
    """How activations are recorded."""

    device: str | None = flag(None, shown="a GPU where there is one", help="Torch device")
    dtype: Literal["fp32", "bf16"] | None = flag(None, shown="bf16 on a GPU, else fp32")
    """Number format of the models."""
    batch_tokens: int | None = flag(
        None, least=1, metavar="TOKENS", shown="{cuda} on a GPU, else {cpu}".format(**BATCH_TOKENS)
    )
    """Tokens in a batch, padding included."""
    shard_tokens: int = flag(65_536, least=1, metavar="TOKENS")
    """Tokens in a shard, the unit of resuming."""
    reader: Literal["nnsight", "hooks"] | None = flag(None, shown="nnsight where it is installed")
    """What reads the activations; both read the same."""
    allow_identical: bool = flag(False, help="Accept two models that do not differ")
    overwrite: bool = flag(False, help="Replace a set that was made from other inputs")


def parse_args() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_activation_flags(parser, several=True)
    add_push_flags(parser, "activation sets")
    add_flags(parser.add_argument_group("two models and texts of your own"), OwnPair)
    add_flags(parser.add_argument_group("recording"), Recording)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with parallel.only_first_prints(), ExitStack() as held:
        choices, folders, recording = choices_from_args(args), Folders.from_args(args), from_args(Recording, args)
        with parallel.first_goes_first():
            parallel.check_device(recording.device)
            for choice in choices if args.push else ():  # a name asks for the model, and rows are looked for first
                require_push(args, choice.student, choice.name)
            plan = make_plan(recording, choices, folders, held)
        if plan.choices:
            collect(recording, plan)
        parallel.part()
        if parallel.is_first():
            for choice in choices:
                if choice.pair:
                    places = portable(choice.pair, choice.student)[1]
                    write_json(folders.activations(choice.name) / PLACES, places)
                    print(f"next: {choice.command('train.py', folders)}")
                repository = hub_id(choice.student, choice.name) if args.push else None
                write_activations_card(folders.activations(choice.name), repository)
                hub.push_folder(folders.activations(choice.name), repository, args.push, args.private, "dataset")


@dataclass(frozen=True)
class Plan:
    """What is to be recorded, known before a model is loaded."""

    choices: list[ActivationChoice]
    """The choices whose sets are not there yet."""
    inputs: list[dict[str, Any]]
    """For each, what it is made from."""
    writers: list[SetWriter]
    targets: list[Target]
    documents: list[Document]
    shards: list[Shard]
    skip_id: int | None
    """BOS, which is not recorded at the start of a document."""
    fine_tuned: Path
    instruct: Path | None
    """The adapter in the base model's place."""
    device: str
    dtype: str
    reader: Any


def make_plan(recording: Recording, choices: list[ActivationChoice], folders: Folders, held: ExitStack) -> Plan:
    """Check all that can be checked without a model, say what is needed, and make ready the folders.

    `held` takes what keeps other runs out of them.
    """
    from crosscoder.activations import recorded_inputs, recording_plan
    from crosscoder.activations.collection import planned_shards
    from crosscoder.activations.readers import Target, default_reader
    from crosscoder.activations.writer import SetWriter

    first = choices[0]
    source = recorded_inputs.read_source(first, folders)
    base = students.resolve_model(first.student.model, first.student.revision)
    fine_tuned = recorded_inputs.find_fine_tuned(first, folders)
    instruct = recorded_inputs.find_instruct(first, folders)
    shape = recording_plan.model_shape(base)
    shape.check_layers([choice.resolved_layer for choice in choices])
    if not is_adapter(fine_tuned):
        shape.check_same(recording_plan.model_shape(str(fine_tuned)), fine_tuned)
    documents, tokenizer = source.tokenize(fine_tuned)

    device = recording.device or students.default_device()
    dtype = recording.dtype or ("bf16" if device.startswith("cuda") else "fp32")
    facts = recorded_inputs.describe_inputs(first, base, fine_tuned, source.files, instruct) | {"dtype": dtype}
    batch_tokens = recording.batch_tokens or BATCH_TOKENS.get(device.partition(":")[0], BATCH_TOKENS["cpu"])
    skip_id = None if first.keep_bos else tokenizer.bos_token_id
    missing, inputs, writers = [], [], []
    for choice in choices:
        made_from = recorded_inputs.inputs_of(choice, facts, documents)
        made_from |= {"device": device, "batch_tokens": batch_tokens, **template_facts(tokenizer)}
        folder = folders.activations(choice.name)
        if recorded_inputs.is_collected(folder, made_from["fingerprint"], recording.overwrite):
            print(f"{folder} is complete and was made from these inputs")
            continue
        if parallel.is_first():
            held.enter_context(only_run_on(folder))
        shards_of = {**made_from, "shard_tokens": recording.shard_tokens}
        missing.append(choice)
        inputs.append(made_from)
        writers.append(SetWriter(folder, shape.d_model, shards_of, drop_outliers=not choice.keep_outliers))
    shards = planned_shards(documents, skip_id, recording.shard_tokens, batch_tokens)
    if missing and parallel.is_first():
        n_tokens = sum(shard.n_tokens for shard in shards)
        say_what_it_takes(first, base, fine_tuned, device, dtype, batch_tokens, len(missing))
        recording_plan.print_plan(len(documents), n_tokens, shape, [writer.partial for writer in writers])
        for writer in writers:
            writer.prepare()
    return Plan(
        choices=missing,
        inputs=inputs,
        writers=writers,
        targets=[Target(choice.resolved_layer, choice.site) for choice in missing],
        documents=documents,
        shards=shards,
        skip_id=skip_id,
        fine_tuned=fine_tuned,
        instruct=instruct,
        device=parallel.own_device(device),
        dtype=dtype,
        reader=recording.reader or default_reader(),
    )


def say_what_it_takes(
    choice: ActivationChoice, base: str, fine_tuned: Path, device: str, dtype: str, batch_tokens: int, n_sets: int
) -> None:
    """Print the memory that the models and a batch take; UserError where they cannot fit."""
    from crosscoder.activations import recording_plan
    from finqa.runtime.memory.needs import read_config, sizes
    from finqa.runtime.memory.plan import check_fits

    model = sizes(read_config(base))
    value_bytes = {"fp32": 4, "bf16": 2}[dtype]
    extra: float = model.parameters * value_bytes
    if is_adapter(fine_tuned):
        extra = (fine_tuned / "adapter_model.safetensors").stat().st_size
    in_4bit = choice.student.load_in_4bit
    need = recording_plan.recording_need(model, extra, in_4bit, value_bytes, batch_tokens, n_sets)
    remedy = "a smaller --batch-tokens, fewer layers and sites at once, base + adapter in place of --merged"
    check_fits("collecting activations", need, free_memory(device), device, f"what helps: {remedy}")


def collect(recording: Recording, plan: Plan) -> None:
    """Record this process's share of the shards; the first process then makes the sets of them."""
    from crosscoder.activations.collection import record, stored_documents, token_table

    started = time.monotonic()
    missing = [shard for shard in plan.shards if not all(writer.has(shard.number) for writer in plan.writers)]
    for writer in plan.writers:
        parallel.check_shared(writer.partial, writer.seen(len(plan.shards)))
    if len(missing) < len(plan.shards):
        print(f"going on: {len(plan.shards) - len(missing)} of {len(plan.shards)} shards are there", flush=True)
    own = missing[parallel.rank() :: parallel.world_size()]
    readers = load_readers(plan) if own else None
    progress = Progress("tokens recorded", sum(shard.n_tokens for shard in own), sys.stdout)
    if readers:
        record(
            readers,
            plan.targets,
            plan.documents,
            own,
            plan.writers,
            plan.skip_id,
            plan.device,
            allow_identical=recording.allow_identical,
            on_batch=progress.advance,
        )
        progress.close()
    parallel.wait_for_all()
    seconds, done = max(time.monotonic() - progress.started, 1e-9), parallel.total(progress.done)
    if not parallel.is_first():
        return
    table = token_table(plan.documents, plan.shards, plan.skip_id)
    shard_tokens = [shard.n_tokens for shard in plan.shards]
    for choice, inputs, writer in zip(plan.choices, plan.inputs, plan.writers, strict=True):

        def manifest(folder: Path, choice: ActivationChoice = choice, inputs: dict[str, Any] = inputs) -> None:
            write_manifest(
                folder / "run.json",
                settings_of(choice, recording),
                inputs=inputs,
                reader=plan.reader,
                processes=parallel.world_size(),
                seconds=round(time.monotonic() - started, 1),
                memory_gb=round(memory_used() / 1e9, 3),
                tokens_per_second=round(done / seconds),
            )

        config = writer.finish(table, stored_documents(plan.documents), inputs, shard_tokens, manifest)
        if config.n_dropped:
            print(
                f"{config.n_dropped:,} tokens ({config.n_dropped / config.n_tokens:.2%}) have more than ten times the "
                f"median norm at layer {choice.resolved_layer} ({choice.site}), as attention sinks have: no dictionary "
                "reads them; keep them with --keep-outliers"
            )
        scales = " and ".join(f"{scale:.4g}" for scale in config.activation_scales)
        print(
            f"{config.n_tokens:,} tokens of {len(plan.documents)} documents at layer {choice.resolved_layer} "
            f"({choice.site}), scales {scales}, {done / seconds:,.0f} tokens/s for both models, in {writer.folder}"
        )


def load_readers(plan: Plan) -> tuple[Read, Read]:
    """Readers of the instruct and the fine-tuned model."""
    import torch

    from crosscoder.activations.fused import fuse, fuse_adapter
    from crosscoder.activations.readers import adapter_readers, in_the_models_dtype, reader

    student = plan.choices[0].student
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[plan.dtype]
    base = students.load_base(student.model, dtype, plan.device, student.load_in_4bit, student.revision)
    models = [base]
    if not is_adapter(plan.fine_tuned):
        models.append(students.load_base(str(plan.fine_tuned), dtype, plan.device))
    if plan.device.startswith("cuda"):
        for model in models:
            fuse(model)
    if is_adapter(plan.fine_tuned):
        adapted = students.load_adapter(base, plan.fine_tuned)
        if plan.instruct:
            check_base(plan.instruct, str(base.name_or_path))
            adapted.load_adapter(str(plan.instruct), INSTRUCT_ADAPTER)
        in_the_models_dtype(adapted.eval(), dtype)
        if plan.device.startswith("cuda"):
            fuse_adapter(adapted)
        return adapter_readers(adapted, plan.targets, plan.reader, INSTRUCT_ADAPTER if plan.instruct else None)
    instruct, fine_tuned = (reader(model, plan.targets, plan.reader) for model in models)
    return instruct, fine_tuned


if __name__ == "__main__":
    sys.exit(report_errors(main))
