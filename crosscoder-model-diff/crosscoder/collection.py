"""Reads the activations of two models over the same tokens, by nnsight, stopping after the layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscoder.activation_store import ActivationWriter, StoredDocument
from crosscoder.names import Site
from finqa.errors import UserError
from finqa.prompts import completion
from finqa.records import TeacherRow
from finqa.students import training_ids

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Read = Callable[[Tensor, Tensor], Tensor]
"""Token ids and attention mask, both [batch, time], to activations [batch, time, d_model]."""


@dataclass(frozen=True)
class Document:
    """The token ids of one prompt and its program."""

    id: str
    ids: tuple[int, ...]
    n_prompt: int
    """How many of them are the prompt."""


def documents_from_rows(
    rows: Iterable[TeacherRow], tokenizer: PreTrainedTokenizerBase, raw: bool = False
) -> list[Document]:
    """The ids that the student was trained on, a document a row.

    `raw`: prompt and completion are joined without the chat template, after the tokenizer's own special tokens.
    """
    documents = []
    for number, row in enumerate(rows):
        if raw:
            asked: Any = tokenizer(row.prompt)["input_ids"]
            reply: Any = tokenizer(completion(row.generated_code), add_special_tokens=False)["input_ids"]
            ids, n_prompt = [*asked, *reply], len(asked)
        else:
            ids, n_prompt = training_ids(tokenizer, row.prompt, row.generated_code)
        documents.append(Document(row.id or str(number), tuple(ids), n_prompt))
    return documents


def assert_same_ids(instruct: Sequence[Document], fine_tuned: Sequence[Document]) -> None:
    """UserError at the first document that the two models' tokenizers do not read as the same ids."""
    for ours, theirs in zip(instruct, fine_tuned, strict=True):
        if ours.ids != theirs.ids:
            raise UserError(
                f"document {ours.id}: the tokenizers of the two models give different ids, so their activations "
                "cannot be paired; the fine-tuned model's tokenizer must be its base model's"
            )


def reader(model: PreTrainedModel, layer: int, site: Site) -> Read:
    """A callable that gives the output of `site` in `layer` (counted from 1) and runs nothing after it.

    With a LoRA adapter in the model's layers, what it reads is the model with or without the adapter, as the
    adapter is switched at the time of the call.
    """
    import nnsight

    traced: Any = nnsight.NNsight(model)
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        raise UserError(f"{type(model).__name__} is no Llama-like model: it has no model.layers to read from")
    if not 1 <= layer <= len(layers):
        raise UserError(f"--layer {layer}: the model has layers 1 to {len(layers)}")
    block = traced.model.layers[layer - 1]
    module = {"mlp": lambda: block.mlp, "attention": lambda: block.self_attn, "residual": lambda: block}[site]()

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad(), traced.trace(input_ids=ids, attention_mask=mask, use_cache=False) as tracer:
            output = module.output
            hidden = nnsight.save(output[0] if isinstance(output, tuple) else output)
            tracer.stop()
        return hidden

    return read


def adapter_readers(model: PeftModel, layer: int, site: Site) -> tuple[Read, Read]:
    """(instruct, fine-tuned) readers of one model in memory, its adapter switched off and on."""
    whole: Any = model.get_base_model()
    read = reader(whole, layer, site)

    def without_adapter(ids: Tensor, mask: Tensor) -> Tensor:
        with model.disable_adapter():
            return read(ids, mask)

    return without_adapter, read


def batches_by_length(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of documents of about equal length; a batch, padded, has at most `batch_tokens` tokens (or is one)."""
    batch: list[int] = []
    for index in sorted(range(len(documents)), key=lambda i: len(documents[i].ids)):
        if batch and (len(batch) + 1) * len(documents[index].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def record(
    readers: tuple[Read, Read],
    documents: Sequence[Document],
    writer: ActivationWriter,
    skip_id: int | None,
    device: torch.device | str,
    batch_tokens: int,
    allow_identical: bool = False,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> list[StoredDocument]:
    """Write the activations of every document's tokens, padding and the token `skip_id` (BOS) left out.

    `on_batch` is told how many tokens a batch added. UserError when the two models agree on every activation of
    the first batch, as they do when an adapter is not active, unless `allow_identical`.
    """
    checked = allow_identical
    for batch in batches_by_length(documents, batch_tokens):
        ids, mask = _padded([documents[i].ids for i in batch])
        row, position = (mask.bool() & (ids != (-1 if skip_id is None else skip_id))).nonzero(as_tuple=True)
        on_device = ids.to(device), mask.to(device)
        pair = torch.stack([read(*on_device)[row, position] for read in readers], dim=1)
        if not checked and torch.equal(pair[:, 0], pair[:, 1]):
            raise UserError(
                "the two models give the same activations for every token: the adapter changes nothing up to this "
                "layer; choose a later --layer, or say --allow-identical where that is meant"
            )
        checked = True
        writer.add(pair, torch.tensor(batch)[row], position, ids[row, position])
        on_batch(len(row))
    return [StoredDocument(d.id, len(d.ids), d.n_prompt) for d in documents]


def fingerprint(documents: Sequence[Document], facts: dict[str, Any]) -> str:
    """A hash that changes with any id that is read and with any of `facts`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for document in documents:
        digest.update(json.dumps([document.id, document.ids, document.n_prompt]).encode())
    return digest.hexdigest()


def _padded(rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [batch, time], padded on the right: in a causal model no real token sees the padding."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids, mask
