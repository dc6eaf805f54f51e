"""The rows that a student is trained on: read, tokenised, batched."""

from __future__ import annotations

import hashlib
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from finqa.models import students
from finqa.models.students import training_ids
from finqa.runtime import parallel
from finqa.runtime.errors import UserError
from finqa.runtime.paths import temporary_folder
from finqa.task import prompts
from finqa.task.records import TeacherRow, read_teacher_rows

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Families = Literal["all", "known", "new"]

NO_LOSS = -100
"""Label of a token that carries no loss, by torch's convention."""


class Example(TypedDict):
    """One training row as token ids: a row of the Dataset that `tokenised` makes."""

    id: str
    ids: Sequence[int]
    """Prompt, completion, end token."""
    n_prompt: int
    """How many of `ids` are prompt; the loss is taken on the others."""
    n_tokens: int
    """How many `ids` there are, as a column that is read without them."""


def example(name: str, ids: Sequence[int], n_prompt: int) -> Example:
    return {"id": name, "ids": ids, "n_prompt": n_prompt, "n_tokens": len(ids)}


def read_training_rows(path: Path, families: Families = "all", max_rows: int | None = None) -> list[TeacherRow]:
    """Rows of a filtered CSV, the first `max_rows` of them, of one kind of family or of all.

    Rows without a prompt or a program, which a file from elsewhere may have, are left out, and that is said.
    With `known` or `new` there are as many rows as `all` would have, so that two runs that differ in the families
    alone take the same steps; where the file has too few of the kind they are repeated in order, and that is said.
    """
    every = read_teacher_rows(path)
    rows = [row for row in every if row.prompt.strip() and row.generated_code.strip()]
    if len(rows) < len(every):
        print(f"WARNING: {len(every) - len(rows)} of {len(every)} rows of {path} have no prompt or no program and are "
              "left out", flush=True)  # fmt: skip
    wanted = min(len(rows), max_rows or len(rows))
    if families != "all":
        chosen = [row for row in rows if row.family_kind == families]
        if not chosen:
            raise UserError(f"{path} has no rows of {families} families; leave out --families")
        if len(chosen) < wanted:
            print(f"{len(chosen)} rows of {families} families, repeated in order to make {wanted}", flush=True)
        rows = [chosen[i % len(chosen)] for i in range(wanted)]
    rows = rows[:wanted]
    if not rows:
        raise UserError(f"{path} has no rows to train on; look at the rejected rows beside it")
    return rows


def rows_hash(rows: Sequence[TeacherRow]) -> str:
    """sha256 of what is learnt from the rows: prompts and programs, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.prompt}\0{row.generated_code}\0".encode())
    return digest.hexdigest()


def tokenised(
    rows: Sequence[TeacherRow], tokenizer: PreTrainedTokenizerBase, max_seq_length: int, cache: Path
) -> tuple[Dataset, list[str]]:
    """Rows as token ids in their order, and the ids of those left out for being over `max_seq_length` tokens.

    Returns a Dataset of `Example`s, kept as a file in the folder `cache`: rows that were tokenised before in the same
    way, whatever the maximum, are read from there, unless the file is damaged.
    Raises UserError where every row is too long.
    """
    every = _all_tokenised(rows, tokenizer, cache)
    fits = [n_tokens <= max_seq_length for n_tokens in every["n_tokens"]]
    if all(fits):
        return every, []
    too_long = [name for name, short in zip(every["id"], fits, strict=True) if not short]
    shown = ", ".join(too_long[:5]) + (", ..." if len(too_long) > 5 else "")
    print(
        f"WARNING: {len(too_long)} of {len(rows)} rows are over {max_seq_length} tokens and left out ({shown}); "
        "--max-seq-length changes that",
        flush=True,
    )
    if not any(fits):
        raise UserError(f"every row is over {max_seq_length} tokens; raise --max-seq-length")
    return every.select([row for row, short in enumerate(fits) if short]), too_long


def _all_tokenised(rows: Sequence[TeacherRow], tokenizer: PreTrainedTokenizerBase, cache: Path) -> Dataset:
    from datasets import Dataset, Features, List, Value, disable_progress_bars
    from datasets.table import InMemoryTable

    if not sys.stderr.isatty():
        disable_progress_bars()

    def with_ids(*columns: list[str]) -> dict[str, list[Any]]:
        texts = zip(*columns, strict=True)
        made = [example(name, *training_ids(tokenizer, prompt, code)) for name, prompt, code in texts]
        return {column: [row[column] for row in made] for column in Example.__annotations__}

    names = [row.id or f"row {number}" for number, row in enumerate(rows)]
    texts = {"id": names, "prompt": [row.prompt for row in rows], "code": [row.generated_code for row in rows]}
    number = Value("int32")
    fingerprint = _fingerprint(names, rows, tokenizer)
    file = cache / f"{fingerprint}.arrow"
    cache.mkdir(parents=True, exist_ok=True)
    if not _is_whole(file, len(rows)):
        with temporary_folder(file) as partial:
            made = partial / file.name
            # Named here: the name that Dataset.from_dict makes pickles pyarrow itself where that lies outside of a
            # folder called site-packages (pip install --target), which fails.
            Dataset(InMemoryTable.from_pydict(texts), fingerprint=fingerprint).map(
                with_ids,
                batched=True,
                input_columns=list(texts),
                remove_columns=list(texts),
                features=Features({"id": Value("string"), "ids": List(number), "n_prompt": number, "n_tokens": number}),
                cache_file_name=str(made),
                new_fingerprint=fingerprint,
                desc="tokenising",
            )
            made.replace(file)
    return Dataset.from_file(str(file))


def _is_whole(file: Path, n_rows: int) -> bool:
    """Whether a file of the cache has all rows.

    A machine that went down, or a copy that was broken off, can leave the beginning of one; where that ends between
    two batches it reads as fewer rows, without an error.
    """
    from datasets import Dataset

    try:
        return len(Dataset.from_file(str(file))) == n_rows
    except (OSError, ValueError):
        return False


def _fingerprint(names: Sequence[str], rows: Sequence[TeacherRow], tokenizer: PreTrainedTokenizerBase) -> str:
    """Names what comes of tokenising rows: it changes with the rows, the tokenizer (chat template and special tokens
    included), the code here and the versions of the libraries.

    What shows in none of these, such as a chat template that writes the day's date, shows in the first row's ids.
    (A fingerprint that `datasets` makes by itself knows of a function in another module its name alone.)
    """
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{rows_hash(rows)} {tokenizers.__version__} {transformers.__version__}".encode())
    digest.update(repr((names, training_ids(tokenizer, rows[0].prompt, rows[0].generated_code))).encode())
    for module in (prompts, students, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).iterdir()):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def collator(pad_id: int) -> Callable[[Sequence[Example]], dict[str, Any]]:
    """Puts examples into one batch, padded on the right to the longest.

    The batch has input_ids and labels [rows, longest] and the number of real tokens. There is no attention mask:
    behind a causal mask a real token never sees padding on its right. The end token has its loss also where it is
    the padding token as well.
    """

    def collate(examples: Sequence[Example]) -> dict[str, Any]:
        import torch

        longest = max(example["n_tokens"] for example in examples)
        input_ids = torch.full((len(examples), longest), pad_id)
        labels = torch.full((len(examples), longest), NO_LOSS)
        for row, example in enumerate(examples):
            ids, n_prompt = torch.tensor(example["ids"]), example["n_prompt"]
            input_ids[row, : len(ids)] = ids
            labels[row, n_prompt : len(ids)] = ids[n_prompt:]
        return {"input_ids": input_ids, "labels": labels, "n_tokens": sum(e["n_tokens"] for e in examples)}

    return collate


NO_ROW = -1
"""What `LengthGrouped` gives in place of a row where there is none left."""


class SharedRows:
    """The rows for several processes: under NO_ROW there is one token without loss.

    The last batch of an epoch seldom has a row for every process, and a process without one must take the step too.
    """

    def __init__(self, rows: Dataset, pad_id: int):
        self.rows = rows
        self.nothing = example("", (pad_id,), 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row_or_column: int | str) -> Any:
        return self.nothing if row_or_column == NO_ROW else self.rows[row_or_column]


class LengthGrouped:
    """Order of the rows in an epoch: shuffled, rows of like length in one batch, batches in random order.

    The order follows from seed and epoch alone, so a resumed run sees what the uninterrupted one would have seen.
    So do several processes: the batches that they take in turn, `batch_size` rows each, make together the batches
    that one process would have seen with as many rows as all of them; the last one is filled up with NO_ROW.
    """

    POOL = 50
    """Batches that are sorted together: more pads less, fewer mixes more."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, processes: int | None = None):
        """`batch_size` is one process's; `processes` is how many there are, as launched where it is not given."""
        self.lengths = lengths
        self.processes = parallel.world_size() if processes is None else processes
        self.batch_size = batch_size * self.processes
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self._missing()

    def _missing(self) -> int:
        return -len(self.lengths) % self.batch_size if self.processes > 1 else 0

    def __iter__(self) -> Iterator[int]:
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        pool = self.batch_size * self.POOL
        grouped: list[int] = []
        for start in range(0, len(order), pool):
            grouped += sorted(order[start : start + pool], key=lambda row: self.lengths[row])
        batches = [grouped[i : i + self.batch_size] for i in range(0, len(grouped), self.batch_size)]
        # A last batch that is not full stays last: the loader cuts the stream into batches again.
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([row for batch in shuffled + last for row in batch] + [NO_ROW] * self._missing())


def completion_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token carries loss.

    Args:
        labels: [rows, length] token ids, NO_LOSS where there is none.

    Returns a bool mask [rows, length] of the positions that predict a labelled token, and those tokens [n].
    """
    import torch

    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LOSS)
    where = following != NO_LOSS
    return where, following[where]
