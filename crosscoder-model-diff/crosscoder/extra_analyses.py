"""Analyses that need more than a dictionary and its activations: the dictionary of another seed, or the models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crosscoder.analysis import measures as analysis
from crosscoder.analysis.findings import Findings
from crosscoder.analysis.latent_scaling import LatentScaling, latent_scaling
from crosscoder.analysis.stability import features, stability_rows
from crosscoder.dictionaries.checkpoint import find_checkpoint, load_dictionary, read_config
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions.causal import cell_key
from crosscoder.interventions.halves import ends_of
from crosscoder.interventions.sets import dictionary_digest, digest
from crosscoder.interventions.splicing import (
    loss_recovered,
    mean_activations,
    splice_losses,
    stored_texts,
    target_of,
)
from crosscoder.opening import OpenedCrosscoder
from crosscoder.own_pair import check_there, check_unchanged
from finqa.models import students
from finqa.models.adapters import is_adapter
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.progress import say

if TYPE_CHECKING:
    from torch import Tensor

    from crosscoder.activations.store import ActivationStore
    from crosscoder.interventions.halves import Pair, Side
    from crosscoder.names import ActivationChoice
    from finqa.runtime.paths import Folders

CONFIRMED = "fine-tuned-only, confirmed"
"""Name of the set of latents that latent scaling confirms."""


def open_second(opened: OpenedCrosscoder, name: Path | str, any_method: bool = False) -> BatchTopKCrosscoder:
    """The dictionary that stability is measured against; UserError where it cannot be compared with the one read."""
    folder = find_checkpoint(name)
    config, own = read_config(folder), opened.model.config
    fingerprint = opened.store.config.recorded.get("fingerprint")
    if config.activations and config.activations["fingerprint"] != fingerprint:
        raise UserError(f"{folder} was trained on other activations than those in {opened.store.folder}")
    same = any_method or config.crosscoder.method == own.method
    if not same or config.crosscoder.d_model != own.d_model:
        other = f"{config.crosscoder.method} of width {config.crosscoder.d_model}"
        raise UserError(f"{folder} is a {other}, and cannot be matched with a {own.method} of width {own.d_model}")
    return load_dictionary(folder).to(opened.model.b_dec.device)


def stability_table(found: Findings, second: BatchTopKCrosscoder) -> list[dict[str, Any]]:
    """stability.stability_rows of the latents that are active on training tokens, by class.

    The latents that latent scaling confirms as fine-tuned-only, in either dictionary on held-out documents, are a set
    of their own. Kept in the results' stability.jsonl, so that it is measured once.
    """
    opened, two = found.opened, found.two_models
    store, split = opened.store, opened.split
    made_of = [
        dictionary_digest(opened.model),
        dictionary_digest(second),
        store.config.recorded["fingerprint"],
        digest(split.train),
    ]
    key = cell_key(str(made_of), "stability", {})
    with KeyedJournal(opened.results / "stability.jsonl") as journal:
        if key not in journal.found:
            say("matching the latents of two dictionaries one to one: minutes where there are more than 8,000")
            own: dict[str, Tensor] = {}
            other: dict[str, Tensor] = {}
            if two is not None:
                held_out = (raw for _, raw in store.batches(split.held_out, found.config.batch_size))
                own[CONFIRMED] = _confirmed(opened.model, two.scaling)
                other[CONFIRMED] = _confirmed(second, latent_scaling(second, held_out))
            first = features(opened.model, store, split.train, own)
            another = features(second, store, split.train, other)
            journal.add(key, {"what": "stability", "rows": stability_rows(first, another)})
        return journal.found[key]["rows"]


def _confirmed(model: BatchTopKCrosscoder, scaling: LatentScaling) -> Tensor:
    """[latent] mask."""
    kinds = analysis.latent_classes(model)
    return analysis.class_masks(kinds, scaling.exclusive[:, 1])["fine-tuned-only"]


def splice(opened: OpenedCrosscoder, pair: Pair) -> list[dict[str, Any]]:
    """Rows of splicing.loss_recovered over the held-out documents; the mean ablation is that of the training tokens.

    Goes on where it was killed, by the results' splicing.jsonl.
    """
    store, split = opened.store, opened.split
    numbers = store.document[split.held_out].unique().tolist()
    bos_id: Any = opened.tokenizer.bos_token_id
    texts = stored_texts(store, numbers, bos_id)
    means = mean_activations(store, split.train)
    with KeyedJournal(opened.results / "splicing.jsonl") as journal:
        losses = splice_losses(opened.model, pair, texts, target_of(store), means, journal)
    return [each._asdict() for each in loss_recovered(losses)]


def cause(found: Findings, pair: Pair, n_documents: int | None = None) -> tuple[dict[str, Any], list[float]]:
    """The causal report on the first `n_documents` held-out documents (None: all), and the estimated effect of every
    latent, in nats a document.

    Latents are ranked by their estimated effect on as many training documents. Documents are teacher-forced: the set
    has no labels, so no replies are generated. Files go into causal/ in the folder of the results.
    """
    from crosscoder.interventions.causal_report import causal_report, kept_survey
    from crosscoder.interventions.causal_rows import Asked

    opened, two = found.opened, found.two_models
    store, split = opened.store, opened.split
    bos_id: Any = opened.tokenizer.bos_token_id
    held_out = store.document[split.held_out].unique().tolist()[:n_documents]
    choosing = store.document[split.train].unique().tolist()[: len(held_out)]
    asked, choose_on = (stored_texts(store, numbers, bos_id) for numbers in (held_out, choosing))
    say(f"patching sets of latents on {len(asked)} held-out documents")
    target, folder = target_of(store), opened.results / "causal"
    report = causal_report(
        opened.model,
        pair,
        [Asked(document) for document in asked],
        choose_on,
        target,
        folder,
        scaling=two.scaling if two else None,
    )
    effect = kept_survey(folder, opened.model, pair, choose_on, target).effect
    return report, (effect / len(choose_on)).tolist()


def causal_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a causal report, the interval of the recovered share as two columns."""
    rows = []
    for row in report["rows"]:
        low, high = row["interval"] or (None, None)
        kept = {name: value for name, value in row.items() if name not in ("interval", "gap_interval")}
        rows.append(kept | {"recovered_low": low, "recovered_high": high})
    return rows


def load_pair(store: ActivationStore, choice: ActivationChoice, folders: Folders) -> Pair:
    """Both models that a set's activations are of, in the precision that they were recorded in, and on a GPU fused as
    they were then.

    UserError where one is missing, or is not the one that was recorded.
    """
    from crosscoder.activations.fused import fuse, fuse_adapter
    from crosscoder.activations.readers import in_the_models_dtype
    from crosscoder.activations.recorded_inputs import find_fine_tuned, find_instruct
    from crosscoder.interventions.halves import pair_of

    recorded, student = store.config.recorded, choice.student
    if choice.pair:
        check_there(choice.pair.fine_tuned)
    fine_tuned, instruct = find_fine_tuned(choice, folders), find_instruct(choice, folders)
    for folder, key in ((fine_tuned, "fine_tuned_hash"), (instruct, "against_hash")):
        if folder is not None:
            check_unchanged(folder, recorded, key)
    device = students.default_device()
    dtype = torch.bfloat16 if recorded.get("dtype") == "bf16" else torch.float32

    def whole(name: str, *how: Any) -> Any:
        model = students.load_base(name, dtype, device, *how)
        if device.startswith("cuda"):
            fuse(model)
        return model

    def base() -> Any:
        return whole(student.model, student.load_in_4bit, student.revision)

    def adapted(folder: Path) -> Any:
        model = students.load_adapter(base(), folder).eval()
        in_the_models_dtype(model, dtype)
        if device.startswith("cuda"):
            fuse_adapter(model)
        return model

    if instruct is not None:
        pair = pair_of(adapted(instruct).get_base_model(), adapted(fine_tuned).get_base_model())
    elif is_adapter(fine_tuned):
        pair = pair_of(adapted(fine_tuned))
    else:
        pair = pair_of(base(), whole(str(fine_tuned)))
    check_patched(pair.fine_tuned)
    return pair


@torch.no_grad()
def check_patched(side: Side) -> None:
    """UserError where the layers, called one by one, do not give the model's own logits: some families scale their
    embeddings or logits, or cap them."""
    ids = torch.arange(1, 9, device=side.device)[None]
    with side.active():
        expected = side.model(input_ids=ids, use_cache=False).logits.float()
    try:
        entering = side.embedded(ids)
        frame = side.frame(entering)
        own = side.logits(side.to_the_end(entering, 0, frame, ends_of(frame, torch.ones_like(ids).bool())))
        known = (own - expected[0]).abs().max() <= 0.02 * expected.abs().max()
    except TypeError:  # a layer of another kind, which wants to be told more
        known = False
    if not known:
        raise UserError(
            f"{type(side.model).__name__} computes its logits in a way that patches do not know, so --causal and "
            "--splice cannot be measured on it; leave them out"
        )
