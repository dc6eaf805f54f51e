"""Records the activations of two models over the same tokens: documents, their order in a set, and the pass over them.

Nothing here waits for the device between batches: ids go out by asynchronous copies, and what is read is written by
writer.BackgroundWriter while the next batch computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscoder.activations.layout import layout, mark_up, token_texts
from crosscoder.activations.readers import Read, Target
from crosscoder.activations.store import StoredDocument
from crosscoder.activations.writer import BackgroundWriter, SetWriter
from finqa.models.students import training_ids
from finqa.runtime.errors import UserError
from finqa.task.prompts import completion
from finqa.task.records import TeacherRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Document:
    """The token ids of one prompt and its program."""

    id: str
    ids: tuple[int, ...]
    n_prompt: int
    """How many of them are the prompt."""
    untouched: tuple[int, ...] = (0,)
    """Places that no patch changes: BOS, and whatever else a dictionary does not read."""
    kinds: tuple[int, ...] = ()
    """Index into layout.KINDS of every id; empty where it is not known."""

    def cut(self, n: int) -> Document:
        """Its first n tokens, of which the last is predicted also where the prompt is longer."""
        return replace(self, ids=self.ids[:n], n_prompt=min(self.n_prompt, n - 1), kinds=self.kinds[:n])


def documents_from_rows(
    rows: Iterable[TeacherRow], tokenizer: PreTrainedTokenizerBase, raw: bool = False
) -> list[Document]:
    """The ids that the student was trained on, a document a row.

    `raw`: prompt and completion are joined without the chat template, after the tokenizer's own special tokens.
    """
    texts: list[tuple[str, list[int], int]] = []
    for number, row in enumerate(rows):
        if raw:
            asked: Any = tokenizer(row.prompt)["input_ids"]
            reply: Any = tokenizer(completion(row.generated_code), add_special_tokens=False)["input_ids"]
            ids, n_prompt = [*asked, *reply], len(asked)
        else:
            ids, n_prompt = training_ids(tokenizer, row.prompt, row.generated_code)
        texts.append((row.id or str(number), ids, n_prompt))
    spelled, marks = token_texts(tokenizer, {i for _, ids, _ in texts for i in ids}), mark_up(tokenizer)
    return [
        Document(name, tuple(ids), n_prompt, kinds=layout(ids, n_prompt, spelled, marks))
        for name, ids, n_prompt in texts
    ]


def assert_same_ids(instruct: Sequence[Document], fine_tuned: Sequence[Document], why: str = "") -> None:
    """UserError, with what is known of `why`, at the first document that the two models' tokenizers read as other
    ids."""
    for ours, theirs in zip(instruct, fine_tuned, strict=True):
        if ours.ids != theirs.ids:
            raise UserError(
                f"document {ours.id}: the tokenizers of the two models give different ids{why}, so their activations "
                "cannot be paired; the fine-tuned model's tokenizer must be its base model's"
            )


@dataclass(frozen=True)
class Shard:
    """One shard of a set: which documents, in which batches."""

    number: int
    batches: tuple[tuple[int, ...], ...]
    """Indices of documents; those of a batch are read together."""
    n_tokens: int
    """Tokens that are recorded."""


def planned_shards(
    documents: Sequence[Document], skip_id: int | None, shard_tokens: int, batch_tokens: int
) -> list[Shard]:
    """Cut the documents, shortest first, into shards and those into batches.

    The order of tokens follows from the documents alone: by length of document, then its index, then position. A
    shard is full at `shard_tokens` recorded tokens; a batch, padded, has at most `batch_tokens` tokens (or is one
    document). `skip_id` is BOS, which is not recorded where a document starts with it; it may be the end token, too.
    """
    shards: list[Shard] = []
    waiting: list[int] = []
    n_tokens = 0
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    for place, index in enumerate(order):
        waiting.append(index)
        n_tokens += len(documents[index].ids) - (documents[index].ids[0] == skip_id)
        if n_tokens >= shard_tokens or place == len(order) - 1:
            batches = batches_by_length([len(documents[i].ids) for i in waiting], batch_tokens)
            named = tuple(tuple(waiting[i] for i in batch) for batch in batches)
            shards.append(Shard(len(shards), named, n_tokens))
            waiting, n_tokens = [], 0
    return shards


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[range]:
    """Cut documents of ascending lengths into as few batches as `batch_tokens` allows, of about equal size."""
    greedy = _batches(lengths, batch_tokens, 0)
    even = _batches(lengths, batch_tokens, sum(lengths) / len(greedy))
    return even if len(even) <= len(greedy) else greedy


def _batches(lengths: Sequence[int], batch_tokens: int, enough: float) -> list[range]:
    """Batches of at most `batch_tokens`, padded; with `enough`, each also ends near a multiple of so many tokens."""
    batches, start, done = [], 0, 0
    for i, length in enumerate(lengths):
        full = (i - start + 1) * length > batch_tokens
        near = enough and done + length / 2 > enough * (len(batches) + 1)
        if i > start and (full or near):
            batches.append(range(start, i))
            start = i
        done += length
    return [*batches, range(start, len(lengths))]


def record(
    readers: tuple[Read, Read],
    targets: Sequence[Target],
    documents: Sequence[Document],
    shards: Sequence[Shard],
    writers: Sequence[SetWriter],
    skip_id: int | None,
    device: torch.device | str,
    allow_identical: bool = False,
    on_batch: Callable[[int], None] = lambda n_tokens: None,
) -> None:
    """Write `shards` of the sets of all targets in one pass of each model, padding and `skip_id` (BOS) left out.

    `on_batch` is told how many tokens a batch added. UserError when the two models agree on every activation of
    the first batch, as they do when an adapter is not active, unless `allow_identical`.
    """
    checked = allow_identical
    with BackgroundWriter(device) as background:
        for shard in shards:
            files = None
            for number, batch in enumerate(shard.batches):
                ids, rows = padded([documents[i].ids for i in batch], skip_id)
                pairs = _read_pairs(readers, _sent(ids, device), _sent(rows, device), [w.d_model for w in writers])
                if not checked:
                    _assert_different(pairs, targets)
                checked = True
                files = files or [writer.shard(shard.number, shard.n_tokens) for writer in writers]
                background.put(files, pairs, last=number == len(shard.batches) - 1)
                on_batch(len(rows))


def _read_pairs(readers: Sequence[Read], ids: Tensor, rows: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """For each target the activations of both models [tokens, 2, d_model] bf16 at `rows` of the flattened batch."""
    pairs = [torch.empty(len(rows), len(readers), d, dtype=torch.bfloat16, device=ids.device) for d in widths]
    for m, read in enumerate(readers):
        for pair, hidden in zip(pairs, read(ids), strict=True):
            pair[:, m] = hidden.flatten(0, 1).index_select(0, rows)
    return pairs


def _assert_different(pairs: Sequence[Tensor], targets: Sequence[Target]) -> None:
    for pair, target in zip(pairs, targets, strict=True):
        if torch.equal(pair[:, 0], pair[:, 1]):
            raise UserError(
                f"the two models give the same activations for every token at layer {target.layer} ({target.site}): "
                "fine-tuning changes nothing up to this layer; choose a later --layer, or say --allow-identical where "
                "that is meant"
            )


def token_table(documents: Sequence[Document], shards: Sequence[Shard], skip_id: int | None) -> dict[str, Tensor]:
    """`document`, `position`, `token_id` [tokens] of what `record` writes, in its order; and `kind` where documents
    have it."""
    columns: dict[str, list[Tensor]] = {"document": [], "position": [], "token_id": []}
    if all(document.kinds for document in documents):
        columns["kind"] = []
    for index in (i for shard in shards for batch in shard.batches for i in batch):
        ids = torch.tensor(documents[index].ids)
        position = torch.arange(int(documents[index].ids[0] == skip_id), len(ids))
        columns["document"].append(torch.full_like(position, index))
        columns["position"].append(position)
        columns["token_id"].append(ids[position])
        if "kind" in columns:
            columns["kind"].append(torch.tensor(documents[index].kinds)[position])
    return {name: torch.cat(column) for name, column in columns.items()}


def stored_documents(documents: Sequence[Document]) -> list[StoredDocument]:
    return [StoredDocument(document.id, len(document.ids), document.n_prompt) for document in documents]


def fingerprint(documents: Sequence[Document], facts: dict[str, Any]) -> str:
    """A hash that changes with any id that is read and with any of `facts`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for document in documents:
        digest.update(json.dumps([document.id, document.ids, document.n_prompt]).encode())
    return digest.hexdigest()


def padded(rows: Sequence[tuple[int, ...]], skip_id: int | None) -> tuple[Tensor, Tensor]:
    """Ids [batch, time] padded on the right, and the places in them, flattened, of the tokens that are recorded."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    wanted = torch.arange(ids.shape[1]) < lengths[:, None]
    if skip_id is not None:
        wanted[:, 0] &= ids[:, 0] != skip_id
    return ids, wanted.flatten().nonzero().squeeze(-1)


def _sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; nothing waits for the copy."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
