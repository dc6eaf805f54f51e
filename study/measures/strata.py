"""The tokens of every question in strata: where in the text an activation was read.

A causal model knows no family before the cue, and program text gives the family away in both models. So what a latent
says of a family counts at the last token of the prompt and in the look-ups of the program, and is given for the other
strata beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from finqa.models.students import prompt_ids
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

    Raises UserError where a document has no row, a row no family, or the tokenizer gives other ids than the set has.
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
    layouts = [_layout(row, tokenizer, wording) for row in chosen]
    _check_ids(store, [ids for ids, _ in layouts])
    table = torch.nn.utils.rnn.pad_sequence([codes for _, codes in layouts], batch_first=True)
    return Questions(
        ids=tuple(row.id for row in chosen),
        families=families,
        family=torch.tensor([families.index(row.family) for row in chosen]),
        added=torch.tensor([wording.kinds[name] != "known" for name in families]),
        template=_numbered([wording.templates[row.family] for row in chosen]),
        page=_numbered([_page_key(row) for row in chosen]),
        stratum=table[store.document, store.position],
        document=store.document,
    )


def strata_of(row: TeacherRow, tokenizer: PreTrainedTokenizerBase, wording: Wording) -> list[Stratum]:
    """The stratum of every token of a row's document, BOS and end token included."""
    return [STRATA[code] for code in _layout(row, tokenizer, wording)[1].tolist()]


def _layout(row: TeacherRow, tokenizer: Any, wording: Wording) -> tuple[list[int], Tensor]:
    """[ids] of the document and its strata's codes: those of training_ids, with the place of each in the text."""
    chat = [{"role": "user", "content": row.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt_tokens, prompt_ends = _tokens(tokenizer, text)
    if prompt_tokens != prompt_ids(tokenizer, chat):
        raise UserError(f"{row.id}: the chat template's text and its ids differ, so tokens have no place in the text")
    reply_tokens, reply_ends = _tokens(tokenizer, prompts.completion(row.generated_code))
    strata = [*_of_prompt(row, text, prompt_ends, wording), *_of_reply(row.generated_code, reply_ends), "rest"]
    return [*prompt_tokens, *reply_tokens, tokenizer.eos_token_id], torch.tensor([STRATA.index(s) for s in strata])


def _of_prompt(row: TeacherRow, text: str, ends: Sequence[int], wording: Wording) -> list[Stratum]:
    question = prompts.page_from_prompt(row.prompt)
    question = type(question)(**{**vars(question), "id": row.id, "family": row.family})
    begin = text.index(row.prompt.strip())
    page_start = text.index(prompts.PASSAGE, begin) + len(prompts.PASSAGE)
    page_end = text.rindex(prompts.QUESTION)
    asked = text.index(question.question, page_end)
    asked_end = asked + len(question.question)
    inside = [i for i, end in enumerate(ends) if asked < end <= asked_end]
    after = cue(question, wording, [ends[i] - asked for i in inside])
    strata: list[Stratum] = ["passage" if page_start < end <= page_end else "rest" for end in ends]
    for number, i in enumerate(inside):
        strata[i] = "question before the cue" if number < after else "question after the cue"
    strata[-1] = "last prompt token"
    return strata


def _of_reply(code: str, ends: Sequence[int]) -> list[Stratum]:
    # finqa.task.prompts.completion puts a line break before the code and strips it.
    start, operator_end = (offset + 1 for offset in operation(code.strip()))
    starts = [0, *ends[:-1]]
    return [
        "program before the operator" if end <= start else "operator" if begin < operator_end else "rest"
        for begin, end in zip(starts, ends, strict=True)
    ]


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Ids of a text, no special token added, and where in the text each ends."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]


def _check_ids(store: ActivationStore, ids: Sequence[Sequence[int]]) -> None:
    for document, its in zip(store.documents, ids, strict=True):
        if len(its) != document.n_ids:
            raise UserError(
                f"{document.id}: {len(its)} ids, and {document.n_ids} in {store.folder}: made of other rows"
            )
    table = torch.nn.utils.rnn.pad_sequence([torch.tensor(its) for its in ids], batch_first=True)
    differ = table[store.document, store.position] != store.token_id
    if differ.any():
        document = store.documents[int(store.document[differ][0])]
        raise UserError(
            f"{document.id}: other ids than in {store.folder}: give the rows and tokenizer it was made with"
        )


def _page_key(row: TeacherRow) -> str:
    return hashlib.sha256(row.prompt.rpartition(prompts.QUESTION)[0].encode()).hexdigest()


def _numbered(names: Sequence[str]) -> Tensor:
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])
