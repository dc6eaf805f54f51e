"""The tokens of every question in strata: where in the text an activation was read.

A causal model knows no family before the cue, and program text gives the family away in both models. So what a latent
says of a family counts at the last token of the prompt and in the look-ups of the program, and is given for the other
strata beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from crosscoder.activations.layout import KINDS, token_texts
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis.token_kinds import recorded_kinds
from finqa.runtime.errors import UserError
from finqa.task import prompts
from finqa.task.records import TeacherRow
from study.wording import Wording, cue, operation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stratum = Literal[
    "passage",
    "question before the cue",
    "question after the cue",
    "last prompt token",
    "program before the operator",
    "operator",
    "rest",
]
"""`passage`: the page, table included. The cue itself is in `question after the cue`. `program before the operator`:
its look-ups, from the first token of the completion. `operator`: from where the operation starts up to and with its
first operator (wording.operation). `rest`: chat mark-up, the prompt's request and markers, the program's remainder."""
STRATA: tuple[Stratum, ...] = get_args(Stratum)
PRIMARY: tuple[Stratum, ...] = ("last prompt token", "program before the operator")


@dataclass(frozen=True)
class Questions:
    """The documents of an activation set as questions, in the order of store.documents."""

    ids: tuple[str, ...]
    families: tuple[str, ...]
    """Names of the families, sorted; `family` points into it."""
    family: Tensor
    """[questions] int64."""
    added: Tensor
    """[families] bool: families that the base model has not seen."""
    template: Tensor
    """[questions] int64: questions of one number name the same things (Wording.templates)."""
    page: Tensor
    """[questions] int64: questions of one number are asked of the same page."""
    stratum: Tensor
    """[tokens of the store] int64: index into STRATA."""
    document: Tensor
    """[tokens of the store] int64: whose token it is."""

    def __len__(self) -> int:
        return len(self.ids)

    def is_family(self, family: Tensor | None = None) -> Tensor:
        """[questions, families] bool, of `family` or of other labels of the same questions."""
        labels = self.family if family is None else family
        return labels[:, None] == torch.arange(len(self.families))

    def where(self, stratum: Stratum) -> Tensor:
        """[n] token indices of a stratum."""
        return (self.stratum == STRATA.index(stratum)).nonzero().squeeze(-1)


def questions_of(
    store: ActivationStore, rows: Iterable[TeacherRow], tokenizer: PreTrainedTokenizerBase, wording: Wording
) -> Questions:
    """The questions of a set, by the rows that it was collected from; the set's prompts have the chat template.

    Raises UserError where a document has no row, a row no family, or the set's ids spell another text.
    """
    by_id = {row.id: row for row in rows}
    missing = [document.id for document in store.documents if document.id not in by_id]
    if missing:
        raise UserError(f"{store.folder}: no row for document {missing[0]} and {len(missing) - 1} more")
    chosen = [by_id[document.id] for document in store.documents]
    for row in chosen:
        if row.family not in wording.phrasings:
            raise UserError(f"{row.id}: its family is {row.family!r}, and no such family is known")
    families = tuple(sorted({row.family for row in chosen}))
    return Questions(
        ids=tuple(row.id for row in chosen),
        families=families,
        family=torch.tensor([families.index(row.family) for row in chosen]),
        added=torch.tensor([wording.kinds[name] != "known" for name in families]),
        template=_numbered([wording.templates[row.family] for row in chosen]),
        page=_numbered([_page_key(row) for row in chosen]),
        stratum=_strata(store, chosen, tokenizer, wording)[store.recorded.kept],
        document=store.document,
    )


def _strata(
    store: ActivationStore, rows: Sequence[TeacherRow], tokenizer: PreTrainedTokenizerBase, wording: Wording
) -> Tensor:
    """[recorded] int64: index into STRATA; `rows` has a row for every document."""
    recorded, kinds = store.recorded, recorded_kinds(store, tokenizer)
    texts = token_texts(tokenizer, recorded.token_id.unique().tolist())
    strata = torch.full_like(kinds, STRATA.index("rest"))
    of_page = torch.isin(kinds, torch.tensor([KINDS.index("passage"), KINDS.index("table")]))
    strata[of_page] = STRATA.index("passage")
    for its in recorded.by_document():
        number = int(recorded.document[its.start])
        row, n_prompt = rows[number], store.documents[number].n_prompt
        pieces = [texts[i] for i in recorded.token_id[its].tolist()]
        first = int((recorded.position[its] < n_prompt).sum())
        reply = prompts.completion(row.generated_code)
        if row.prompt.strip() not in "".join(pieces[:first]) or not "".join(pieces[first:]).startswith(reply):
            raise UserError(
                f"{row.id}: another text than in {store.folder}: give the rows and tokenizer it was made with"
            )
        own = strata[its]
        asked = (kinds[its] == KINDS.index("question")).nonzero().squeeze(-1).tolist()
        own[asked] = _codes(_of_question(row, [pieces[i] for i in asked], wording))
        own[first - 1] = STRATA.index("last prompt token")
        own[first:] = _codes(_of_reply(row.generated_code, pieces[first:]))
    return strata


def _of_question(row: TeacherRow, pieces: Sequence[str], wording: Wording) -> list[Stratum]:
    question = replace(prompts.page_from_prompt(row.prompt), id=row.id, family=row.family)
    start = "".join(pieces).index(question.question)
    ends = [end - start for end in accumulate(map(len, pieces))]
    inside = [i for i, end in enumerate(ends) if 0 < end <= len(question.question)]
    after = cue(question, wording, [ends[i] for i in inside])
    strata: list[Stratum] = ["rest"] * len(pieces)
    for number, i in enumerate(inside):
        strata[i] = "question before the cue" if number < after else "question after the cue"
    return strata


def _of_reply(code: str, pieces: Sequence[str]) -> list[Stratum]:
    # finqa.task.prompts.completion puts a line break before the code and strips it.
    start, operator_end = (offset + 1 for offset in operation(code.strip()))
    return [
        "program before the operator" if end <= start else "operator" if begin < operator_end else "rest"
        for begin, end in pairwise(accumulate(map(len, pieces), initial=0))
    ]


def _codes(strata: Sequence[Stratum]) -> Tensor:
    return torch.tensor([STRATA.index(stratum) for stratum in strata], dtype=torch.int64)


def _page_key(row: TeacherRow) -> str:
    return hashlib.sha256(row.prompt.rpartition(prompts.QUESTION)[0].encode()).hexdigest()


def _numbered(names: Sequence[str]) -> Tensor:
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])
