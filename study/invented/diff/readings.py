"""What both models give at the look-ups of test programs: at a site, and as the distribution of the next token.

The positions are those of the completion before its first operation (wording.operation): every program has its three
look-ups there, whatever the formula, so that all metrics of a page are read at the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crosscoder.activations.collection import Document, documents_from_rows
from crosscoder.activations.layout import token_texts
from crosscoder.activations.readers import Target
from crosscoder.interventions.halves import Pair
from crosscoder.interventions.patching import Batch, Halves, batches, patched_logits, run_halves
from crosscoder.interventions.ranking import reading_of
from finqa.runtime.paths import renamed_to
from finqa.runtime.progress import say
from finqa.task.records import TeacherRow, read_teacher_rows
from study.invented.diff import sources
from study.invented.diff.ceilings import asked_of, load_models
from study.invented.diff.dictionaries import folder_of, shared_store
from study.invented.diff.plan import READ_TOO, TOP, Compared, lengths
from study.invented.files import DOCUMENTS
from study.invented.plan import Plan
from study.wording import operation

if TYPE_CHECKING:
    from study.invented.diff.ceilings import Models

BATCH_TOKENS = {"cuda": 8_192, "cpu": 2_048}
"""Padding included. With a vocabulary of 152,000 the logits that are compared take about 4 GB for the larger one."""
LENS_POSITIONS = 5
"""First tokens of unrelated text whose mean difference is read (Minder et al. 2025, arXiv 2510.13900)."""
UNRELATED = (
    "The old lighthouse stood on a cliff above the harbour and could be seen from far away.",
    "Bread rises best in a warm kitchen, away from any draught.",
    "She tuned the violin slowly and listened for the second string to settle.",
    "Most birds of this valley leave in autumn and return when the snow has gone.",
    "A good map shows the height of every hill and the depth of every lake.",
    "Children ran across the square while the band played the last song.",
    "The recipe asks for two lemons, a spoon of honey and a little patience.",
    "Rain fell all night, and by morning the river had covered the lower path.",
)
"""Text that has nothing to do with reports or programs."""


@dataclass(frozen=True)
class Looked:
    """What was read of some questions; on the CPU."""

    pairs: Tensor
    """[tokens, 2, d_model], as the models gave it."""
    question: Tensor
    """[tokens] int64: whose token it is, a place among the questions."""
    n: int
    """Questions."""
    divergence: Tensor
    """[tokens] fp32: KL(fine-tuned || base) of the next token, nats."""
    logits: Tensor
    """[tokens, mined] fp32: centred logits of the mined tokens, fine-tuned less base."""


@dataclass(frozen=True)
class Looks:
    """What was read of the test questions for a pair, and of all documents for all methods."""

    mined: Tensor
    """[mined] int64: tokens of the vocabulary whose logits differ most."""
    of: dict[str, Looked]
    """By arm: the pair's own, and those that its items are read on too."""
    basis: Tensor
    """[d_model, d_model]: all principal components of the difference, over the documents."""
    energies: Tensor
    """[TOP] fp64: what the first of them inject."""


def looks_path(plan: Plan, compared: Compared, target: Target) -> Path:
    return folder_of(plan, compared, target) / "looks.pt"


def looks(plan: Plan, compared: Compared, target: Target, models: Models | None = None) -> Looks:
    """Of a pair at a site; read where that was not done yet, its activations recorded too. `models`: the pair, where it
    is loaded."""
    path = looks_path(plan, compared, target)
    if not path.exists():
        models = models or load_models(plan, compared)
        rows = [row for _, row in asked_of(plan, "test", ("A", "B"))]
        documents = some_documents(plan, models.tokenizer)
        say(f"logits of {len(documents)} documents, for those that differ most")
        mined = mined_tokens(models.pair, target, documents, TOP)
        say(f"reading {len(rows)} test questions by {compared.run}")
        found = {compared.arm: look(models.pair, target, rows, models.tokenizer, mined)}
        for arm in READ_TOO.get(compared.arm, ()):
            other = load_models(plan, Compared(arm, compared.seed))
            say(f"reading them by {arm}, seed {compared.seed}")
            found[arm] = look(other.pair, target, rows, other.tokenizer, mined)
        store, device = shared_store(plan, compared, target), models.pair.instruct.device
        say("principal components of the difference, over all documents")
        moments = sources.difference_moments(store, device)
        basis = sources.principal(moments, len(moments))
        injected = sources.energies(sources.Directions(basis[:TOP]), store, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_to(path) as temporary:
            torch.save(asdict(Looks(mined, found, basis, injected)), temporary)
    kept = torch.load(path, weights_only=True)
    return Looks(**kept | {"of": {arm: Looked(**looked) for arm, looked in kept["of"].items()}})


def some_documents(plan: Plan, tokenizer: Any) -> list[Document]:
    """Some documents, drawn from all: for what is mined without a dictionary."""
    rows = read_teacher_rows(plan.place.part(DOCUMENTS).filtered(plan.dataset, "test"))
    drawn = Random(0).sample(rows, min(lengths(plan).logit_documents, len(rows)))
    return documents_from_rows(drawn, tokenizer)


def before_operation(document: Document, code: str, texts: dict[int, str]) -> list[int]:
    """Positions of the completion's tokens that end before its first operation begins."""
    # The completion starts with a line break, and the code is stripped (finqa.task.prompts.completion).
    start = operation(code.strip())[0] + 1
    ends = accumulate(len(texts[i]) for i in document.ids[document.n_prompt :])
    return [document.n_prompt + place for place, end in enumerate(ends) if end <= start]


def look(pair: Pair, target: Target, rows: Sequence[TeacherRow], tokenizer: Any, mined: Tensor) -> Looked:
    """Read the rows' gold programs. `mined` [n] int64: tokens of the vocabulary whose logits are kept."""
    documents = documents_from_rows(rows, tokenizer)
    texts = token_texts(tokenizer, {i for document in documents for i in document.ids})
    places = [before_operation(d, row.generated_code, texts) for d, row in zip(documents, rows, strict=True)]
    found: list[tuple[Tensor, ...]] = []
    for chosen, halves, (base, fine_tuned) in both_logits(pair, target, documents):
        wanted = torch.zeros_like(halves.batch.predicting)
        for row, index in enumerate(chosen.tolist()):
            wanted[row, places[index]] = True
        sites = [records[target.layer].site(target)[wanted] for records in halves.records]
        among = wanted[halves.batch.predicting]
        ours, theirs = base[among], fine_tuned[among]
        kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
        question = chosen[wanted.nonzero()[:, 0].cpu()]
        parts = (torch.stack(sites, dim=1), question, kl, centred_difference(ours, theirs)[:, mined])
        found.append(tuple(part.cpu() for part in parts))
    pairs, question, divergence, logits = (torch.cat(column) for column in zip(*found, strict=True))
    return Looked(pairs, question, len(rows), divergence, logits)


@torch.no_grad()
def both_logits(
    pair: Pair, target: Target, documents: Sequence[Document]
) -> Iterator[tuple[Tensor, Halves, tuple[Tensor, Tensor]]]:
    """Batch by batch: places of its documents, both models as far as the site, and the logits of base and fine-tuned
    model at the predicting positions."""
    for chosen, batch in _batches(pair, documents):
        halves = run_halves(pair, batch, [target.layer])
        base = patched_logits(pair, halves, target, "sufficiency", "own", None)
        yield chosen, halves, (base, halves.reference)


def _batches(pair: Pair, documents: Sequence[Document]) -> Iterator[tuple[Tensor, Batch]]:
    device = torch.device(pair.instruct.device)
    return batches(documents, device, BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"]))


def centred_difference(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """[tokens, vocabulary]: fine-tuned less base, less its mean over the vocabulary, which changes no probability."""
    difference = fine_tuned - base
    return difference - difference.mean(dim=-1, keepdim=True)


def mined_tokens(pair: Pair, target: Target, documents: Sequence[Document], n: int) -> Tensor:
    """[n] int64: the tokens whose logits differ most, by mean square over the documents' completions."""
    total: Tensor | None = None
    for _, _, (base, fine_tuned) in both_logits(pair, target, documents):
        squares = centred_difference(base, fine_tuned).square().sum(dim=0, dtype=torch.float64)
        total = squares if total is None else total + squares
    assert total is not None, documents
    return total.topk(min(n, len(total))).indices.cpu()


def patched_pairs(pair: Pair, target: Target, documents: Sequence[Document]) -> Tensor:
    """[tokens, 2, d_model] of all positions that a patch changes, on the models' device."""
    found = []
    for _, batch in _batches(pair, documents):
        with torch.no_grad():
            halves = run_halves(pair, batch, [target.layer])
        found.append(reading_of(halves, target).pairs.to(halves.records[0][target.layer].site(target).dtype))
    return torch.cat(found)


def lens_directions(pair: Pair, target: Target, tokenizer: Any) -> Tensor:
    """[positions, d_model] fp32: unit vectors of the mean difference at each of the first tokens of unrelated text."""
    documents = []
    for number, text in enumerate(UNRELATED):
        ids = tokenizer(text)["input_ids"]
        start = 1 if ids[0] == tokenizer.bos_token_id else 0
        documents.append(Document(str(number), tuple(ids[: start + LENS_POSITIONS]), 1, tuple(range(start))))
    total = torch.zeros(LENS_POSITIONS, 2, pair.instruct.model.config.hidden_size)
    for document in documents:
        total += patched_pairs(pair, target, [document]).float().cpu()
    difference = total[:, 1] - total[:, 0]
    return difference / difference.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(difference.dtype).tiny)


def lens_tokens(pair: Pair, directions: Tensor, tokenizer: Any, n: int = 5) -> list[str]:
    """For each direction the tokens that it makes likelier most, by the final norm and the unembedding."""
    with torch.no_grad():
        logits = pair.instruct.logits(directions.to(pair.instruct.device, pair.instruct.model.lm_head.weight.dtype))
    return [" ".join(repr(tokenizer.decode([i])) for i in row) for row in logits.topk(n).indices.tolist()]
