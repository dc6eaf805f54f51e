"""Which part of its document a token belongs to, and what a dictionary does on each of the parts.

A set records token ids, positions and where the program starts; the rest follows from the form of the prompt
(finqa.task.prompts), whose markers are found in the text that the ids spell:

    chat       mark-up of the chat template, around the prompt
    frame      fixed words of the prompt: the request and the markers
    passage    the page, but for its table
    table      its table
    question
    program    the completion up to its end marker
    end        the end marker and what follows it
    other      prompts without the markers, which cannot be told apart

chat and frame are the template: the same in every document. A token that reaches over a border belongs to where its
first character that is no white space stands.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.measures import ExplainedVariance
from crosscoder.dictionaries.config import N_MODELS
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.task.prompts import END_PYTHON, PASSAGE, PYTHON, QUESTION, REQUEST

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenKind = Literal["chat", "frame", "passage", "table", "question", "program", "end", "other"]
KINDS: tuple[TokenKind, ...] = get_args(TokenKind)
TEMPLATE: tuple[TokenKind, ...] = ("chat", "frame")
_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_TABLE = re.compile(r"(?:^[^\n]*\|[^\n]*(?:\n|\Z))+", re.MULTILINE)
"""Lines that hold a `|`, one after another; the longest such run of a page is its table, as for finqa.task.prompts."""
ANCHOR = "a"


class RecordedTokens(NamedTuple):
    """Every token whose activation was recorded, with those that a store leaves out of its reading as outliers."""

    document: Tensor
    """[recorded]: index into the store's documents; a document's tokens stand together."""
    position: Tensor
    token_id: Tensor
    kept: Tensor
    """[recorded] bool: those that the store reads; they are its tokens, in its order."""


def recorded_tokens(store: ActivationStore) -> RecordedTokens:
    from safetensors.torch import load_file

    table = load_file(store.folder / "tokens.safetensors")
    kept, token_id = table["kept"], table["token_id"].long()
    token_id[kept] = store.token_id
    return RecordedTokens(table["document"].long(), table["position"].long(), token_id, kept)


def token_kinds(store: ActivationStore, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[tokens] int64: index into KINDS of every token of a set."""
    recorded = recorded_tokens(store)
    kinds = torch.full_like(recorded.token_id, _NUMBER["other"])
    texts = token_texts(tokenizer, recorded.token_id.unique().tolist())
    special = _mark_up(tokenizer)
    documents, counts = recorded.document.unique_consecutive(return_counts=True)
    start = 0
    for number, count in zip(documents.tolist(), counts.tolist(), strict=True):
        ids = recorded.token_id[start : start + count].tolist()
        positions = recorded.position[start : start + count].tolist()
        n_prompt = sum(position < store.documents[number].n_prompt for position in positions)
        found = kinds_of_document(ids, n_prompt, texts, special)
        kinds[start : start + count] = torch.tensor([_NUMBER[kind] for kind in found])
        start += count
    return kinds[recorded.kept]


def kinds_of_document(ids: Sequence[int], n_prompt: int, texts: dict[int, str], special: set[int]) -> list[TokenKind]:
    """Of every id of a document whose first `n_prompt` ids are the prompt.

    Args:
        texts: What each id spells (`token_texts`).
        special: Ids that are mark-up wherever they stand in a prompt.
    """
    prompt = _cut(ids[:n_prompt], texts, _prompt_borders("".join(texts[i] for i in ids[:n_prompt])))
    kinds: list[TokenKind] = ["chat" if i in special else kind for i, kind in zip(ids, prompt, strict=False)]
    text = "".join(texts[i] for i in ids[n_prompt:])
    end = text.rfind(END_PYTHON)
    borders: list[tuple[int, TokenKind]] = [(0, "program")]
    if end >= 0:
        borders.append((end, "end"))
    completion = _cut(ids[n_prompt:], texts, borders)
    # The end token of a completion whose marker was cut off.
    return [*kinds, *("end" if i in special else kind for i, kind in zip(ids[n_prompt:], completion, strict=True))]


def _prompt_borders(text: str) -> list[tuple[int, TokenKind]]:
    """Where each part of a prompt starts, in order of place; the markers as page_from_prompt finds them."""
    question = text.rfind(QUESTION)
    passage = text.find(PASSAGE, 0, max(question, 0))
    if question < 0 or passage < 0:
        return [(0, "other")]
    # Without the request's own words what stands before the passage may be either; special tokens tell themselves.
    request = text.find(REQUEST, 0, passage)
    page, asked = passage + len(PASSAGE), question + len(QUESTION)
    python = text.rfind(PYTHON, asked)
    borders: list[tuple[int, TokenKind]] = [(0, "chat"), (max(request, 0), "frame"), (page, "passage")]
    tables = list(_TABLE.finditer(text, page, question))
    if tables:
        table = max(tables, key=lambda run: run[0].strip("\n").count("\n"))
        borders.extend([(table.start(), "table"), (table.end(), "passage")])
    borders.extend([(question, "frame"), (asked, "question")])
    if python >= 0:
        borders.extend([(python, "frame"), (python + len(PYTHON), "chat")])
    return borders


def _cut(ids: Sequence[int], texts: dict[int, str], borders: list[tuple[int, TokenKind]]) -> list[TokenKind]:
    """The part in which each id's first character stands, white space before it left out."""
    starts = [place for place, _ in borders]
    kinds, place = [], 0
    for text in (texts[i] for i in ids):
        blank = len(text) - len(text.lstrip())
        first = place + (blank if blank < len(text) else 0)
        kinds.append(borders[bisect_right(starts, first) - 1][1])
        place += len(text)
    return kinds


def _mark_up(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that no text is made of: special tokens, those of the chat template among them."""
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks.update(tokenizer.all_special_ids)
    unknown: Any = tokenizer.unk_token_id
    return marks - {unknown}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """Each token as it reads inside a text: a tokenizer decodes a token that comes first without its space."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
    before = text(anchor)
    texts = {}
    for i in ids:
        both = text([*anchor, i])
        texts[i] = both[len(before) :] if both.startswith(before) else text([i])
    return texts


class KindExplained(NamedTuple):
    """Explained variance on the tokens of one kind."""

    kind: str
    """One of KINDS, or `template` for chat and frame together, or `all`."""
    n_tokens: int
    l0: float
    own_mean: ExplainedVariance
    """Distances are from the mean of these very tokens: the definition of `explained_variance`, applied to them alone.
    It asks for what varies among them; that they are of this kind explains nothing."""
    common_mean: ExplainedVariance
    """Distances are from the mean of all tokens given: the figures of the kinds, weighted by their shares of the
    variance, average to the figure of all."""
    share_of_variance: float
    """Of the difference's squared distances from its mean over all tokens, the part of these tokens."""
    share_of_error: float
    """Of its squared errors."""


@dataclass
class _KindSums:
    """fp64 sums by kind for one target of width d; `shift` keeps the difference of large sums exact."""

    errors: Tensor
    """[kind]"""
    squares: Tensor
    """[kind]: of distances from the shift."""
    sums: Tensor
    """[kind, d]: the same, not squared."""
    shift: Tensor | None = None

    @classmethod
    def of(cls, d: int, device: torch.device) -> _KindSums:
        zeros = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone(), torch.zeros(len(KINDS), d, dtype=torch.float64, device=device))

    def add(self, kinds: Tensor, x: Tensor, xhat: Tensor) -> None:
        """[n] kinds, [n, d] targets and reconstructions."""
        x, xhat = x.double(), xhat.double()
        if self.shift is None:
            self.shift = x.mean(dim=0)
        centred = x - self.shift
        self.errors.index_add_(0, kinds, (x - xhat).pow(2).sum(dim=-1))
        self.squares.index_add_(0, kinds, centred.pow(2).sum(dim=-1))
        self.sums.index_add_(0, kinds, centred)

    def error(self, members: Tensor) -> float:
        return float(self.errors[members].sum())

    def total(self, members: Tensor, counts: Tensor, common: bool) -> float:
        """Squared distances of the members' tokens from their own mean, or from that of all tokens."""
        over = torch.arange(len(KINDS), device=counts.device) if common else members
        mean = self.sums[over].sum(dim=0) / counts[over].sum()
        sums, n = self.sums[members].sum(dim=0), counts[members].sum()
        return float(self.squares[members].sum() - 2 * mean @ sums + n * mean @ mean)


@torch.no_grad()
def explained_variance_by_kind(
    model: BatchTopKCrosscoder, store: ActivationStore, indices: Tensor, kinds: Tensor, batch_size: int = 4096
) -> list[KindExplained]:
    """Of the tokens at `indices` of the store, reconstructed by the inference threshold, kind by kind.

    One pass. `kinds` [tokens of the store] is token_kinds'. First all tokens, then the template, then every kind that
    occurs. Models in scaled space and the difference in the models' own units, as explained_variance has them.
    """
    device = model.b_dec.device
    kinds = kinds.to(device)
    inputs = [_KindSums.of(model.config.d_model, device) for _ in range(model.config.n_inputs)]
    difference = _KindSums.of(model.config.d_model, device)
    counts = torch.zeros(len(KINDS), dtype=torch.float64, device=device)
    active = torch.zeros_like(counts)
    for chunk, raw in store.batches(indices, batch_size):
        raw = raw.to(device)
        x, own = model.scale(raw), kinds[chunk.to(device)]
        f = model.encode(x)
        xhat = model.decode(f)
        counts.index_add_(0, own, torch.ones(len(own), dtype=torch.float64, device=device))
        active.index_add_(0, own, (f > 0).sum(dim=-1).double())
        for m, sums in enumerate(inputs):
            sums.add(own, x[:, m], xhat[:, m])
        truth = model.difference(model.inputs(raw).double())
        difference.add(own, truth, model.difference(model.unscale(xhat.double())))
    groups = {"all": KINDS, "template": TEMPLATE, **{kind: (kind,) for kind in KINDS}}
    found = []
    for name, members in groups.items():
        at = torch.tensor([_NUMBER[kind] for kind in members], device=device)
        if counts[at].sum() > 0:
            found.append(_explained(name, at, inputs, difference, counts, active))
    return found


def _explained(
    name: str, at: Tensor, inputs: list[_KindSums], difference: _KindSums, counts: Tensor, active: Tensor
) -> KindExplained:
    n, l0 = int(counts[at].sum()), float(active[at].sum() / counts[at].sum())
    every = torch.arange(len(KINDS), device=at.device)

    def explained(common: bool) -> ExplainedVariance:
        totals = [sums.total(at, counts, common) for sums in inputs]
        errors = [sums.error(at) for sums in inputs]
        two = len(inputs) == N_MODELS
        return ExplainedVariance(
            instruct=_one_less(errors[0], totals[0]) if two else None,
            fine_tuned=_one_less(errors[1], totals[1]) if two else None,
            joint=_one_less(sum(errors), sum(totals)) if two else None,
            difference=_one_less(difference.error(at), difference.total(at, counts, common)),
            l0=l0,
            n_tokens=n,
        )

    return KindExplained(
        kind=name,
        n_tokens=n,
        l0=l0,
        own_mean=explained(common=False),
        common_mean=explained(common=True),
        share_of_variance=_part(difference.total(at, counts, True), difference.total(every, counts, True)),
        share_of_error=_part(difference.error(at), difference.error(every)),
    )


def _one_less(error: float, total: float) -> float:
    """Not a number where nothing varies, as on a single token."""
    return 1 - error / total if total > 0 else float("nan")


def _part(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def kind_rows(found: Iterable[KindExplained]) -> list[dict[str, Any]]:
    """A flat row a kind, to be written as CSV or JSON; what is not a number or does not apply is None."""
    figures = ("instruct", "fine_tuned", "joint", "difference")
    rows = []
    for each in found:
        row: dict[str, Any] = {"kind": each.kind, "n_tokens": each.n_tokens, "l0": each.l0}
        row |= {name: getattr(each.own_mean, name) for name in figures}
        row |= {f"{name}_common_mean": getattr(each.common_mean, name) for name in figures}
        row |= {name: getattr(each, name) for name in ("share_of_variance", "share_of_error")}
        rows.append({name: None if value != value else value for name, value in row.items()})
    return rows
