"""The study's rows: what every arm is trained on, test, dev, and the documents that dictionaries read.

All arms share their draws: row i of arm A and row i of arm B ask the same page for the same operands in the same
phrasing, and differ in what is asked alone. Everything follows from the seed, the source of the pages and the
student's tokenizer, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

from finqa.runtime.errors import UserError
from finqa.runtime.paths import SPLITS, Folders
from finqa.task.answers import match
from finqa.task.datasets import dataset
from finqa.task.program_compiler import literal
from finqa.task.programs import ProgramError, execute
from finqa.task.prompts import training_prompt
from finqa.task.records import Question, TeacherRow
from preprocessing.teacher.teachers import ProgramTeacher
from study.invented.metrics import (
    Formula,
    Metric,
    Metrics,
    further_pool,
    labels_apart,
    make_metrics,
    names_apart,
    sound_value,
)
from study.invented.pages import Draw, Page, draws, fresh, page_key, pages_of, source_questions, with_fresh_numbers
from study.invented.phrasings import TRAINED, UNSEEN, ask, ask_for_a_row, ask_with_definition, row_name

ARMS = ("A", "A-permuted", "B", "K", "N")
"""A; A' of the page; B; control K, known families alone; control N, look-ups of rows that bear A's names."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    ordinary: int = 1000
    """Questions of the source itself in every arm."""
    known: int = 2000
    """Questions of the eight known families in every arm."""
    own: int = 2000
    """Questions of an arm's own: eight metrics, further known families, or look-ups."""
    defined: int = 0
    """Questions in every arm for metrics that occur once, each after its definition, which is none of the others'."""
    test_pages: int = 60
    dev_pages: int = 20
    documents: int = 250
    """Draws of other pages that all 24 families are asked of."""


FRESH_TRIES = 400
MOST_COLUMNS = 3
"""Columns after the first of a table that is not for training: in wider ones a fine-tune takes the wrong cell now and
then, and what is asked here is which formula it knows."""
QUICK = Sizes(ordinary=8, known=8, own=16, test_pages=4, dev_pages=2, documents=3)
"""For a rehearsal of a few minutes, which shows nothing but that the commands work."""


def teaching(sizes: Sizes) -> Sizes:
    """The sizes with rows that teach to follow a definition, half as many as there are of an arm's own."""
    return replace(sizes, defined=sizes.own // 2)


@dataclass(frozen=True)
class Row:
    """A question, the program that answers it, and what it was drawn from."""

    question: Question
    code: str
    draw: Draw | None = None
    """None for a question of the source itself."""
    number: int = 0
    """Number of its draw within its part."""

    @property
    def prompt(self) -> str:
        return training_prompt(self.question)

    def teacher_row(self) -> TeacherRow:
        q = self.question
        return TeacherRow(
            self.prompt, self.code, "", q.answer, q.id, program=q.program, family=q.family, family_kind=q.family_kind
        )


@dataclass(frozen=True)
class Rows:
    """All rows of the study."""

    dataset: str
    metrics: Metrics
    arms: dict[str, list[Row]]
    dev: list[Row]
    test: list[Row]
    definition: list[Row]
    """The test questions for invented metrics, with the definition before each."""
    documents: list[Row]


def make_rows(
    folders: Folders, source: str, name: str, seed: int, n_tokens: Callable[[str], int], sizes: Sizes = Sizes()
) -> Rows:
    """Everything, from the source's three splits in `folders`.

    Training rows are on pages of train; dev on pages of dev, test on pages of test, documents on other pages of these
    two, all three on narrow tables (MOST_COLUMNS) with fresh numbers. `name` is the data set's.
    Raises UserError where the source has too few pages or questions.
    """
    questions = {split: source_questions(folders, source, split) for split in SPLITS}
    pages = {split: pages_of(questions[split]) for split in SPLITS}
    narrow = {split: [page for page in pages[split] if page.n_columns <= MOST_COLUMNS] for split in ("dev", "test")}
    held_out = {page_key(q.table) for split in ("dev", "test") for q in questions[split]}
    trained_on = [page for page in pages["train"] if page.key not in held_out]
    everything = (text for qs in questions.values() for q in qs for text in (q.passage, q.question, str(q.table)))
    text = "\n".join(everything).lower()
    metrics = make_metrics(seed, n_tokens, text)
    formulas = [metric.formula for metric in metrics.all]

    def drawn(what: str, pages: Sequence[Page], n: int, phrasings: Sequence[int], once: bool = False) -> list[Draw]:
        return draws(pages, n, phrasings, Random(f"{what} {seed}"), formulas, once)

    train = drawn("train", trained_on, sizes.known + sizes.own, TRAINED)
    test = drawn("test", narrow["test"], sizes.test_pages, UNSEEN, once=True)
    tested = {draw.page.key for draw in test}
    dev = drawn("dev", [p for p in narrow["dev"] if p.key not in tested], sizes.dev_pages, TRAINED, once=True)
    used = tested | {draw.page.key for draw in dev}
    others = {page.key: page for page in narrow["dev"] + narrow["test"] if page.key not in used}
    documents = drawn("documents", list(others.values()), sizes.documents, TRAINED)

    ordinary = ordinary_rows(questions["train"], source, held_out, sizes.ordinary, Random(f"ordinary {seed}"))
    known, own = train[: sizes.known], train[sizes.known :]
    names = names_apart(Random(f"once {seed}"), sizes.defined, [metric.name for metric in metrics.invented], text)
    once = drawn("defined", trained_on, sizes.defined, TRAINED)
    shared = [
        *ordinary,
        *in_turn(f"{name}/known", known, metrics.known),
        *defined_once(f"{name}/defined", once, names, Random(f"definitions {seed}")),
    ]
    rng = Random(f"rows of metrics' names {seed}")
    parts = {
        "A": in_turn(f"{name}/A", own, metrics.a),
        "A-permuted": in_turn(f"{name}/A-permuted", own, metrics.a_permuted),
        "B": in_turn(f"{name}/B", own, metrics.b),
        "K": in_turn(f"{name}/K", own, metrics.known),
        "N": [look_up(f"{name}/N", i, draw, metrics.a[i % len(metrics.a)], rng) for i, draw in enumerate(own)],
    }
    order = Random(f"order {seed}").sample(range(len(shared) + len(own)), len(shared) + len(own))
    arms = {arm: [(shared + rows)[place] for place in order] for arm, rows in parts.items()}

    def evaluated(part: str, draws: Sequence[Draw]) -> list[Row]:
        """Minimal pairs: every draw asked for all 24 families."""
        rng = Random(f"fresh numbers {part} {seed}")
        fresh_draws = [fresh_draw(draw, rng, formulas) for draw in draws]
        return [
            asked(f"{name}/{part}", n, draw, metric) for n, draw in enumerate(fresh_draws) for metric in metrics.all
        ]

    tests = evaluated("test", test)
    return Rows(
        dataset=name,
        metrics=metrics,
        arms=arms,
        dev=evaluated("dev", dev),
        test=tests,
        definition=[
            with_definition(row, metric)
            for row in tests
            for metric in metrics.invented
            if metric.name == row.question.family
        ],
        documents=evaluated("documents", documents),
    )


def asked(part: str, number: int, draw: Draw, metric: Metric) -> Row:
    """A draw asked for a metric."""
    question = Question(
        id=f"{part}/{number:05d}-{metric.name.replace(' ', '').replace('/', ':')}",
        pre_text=draw.page.pre_text,
        post_text=draw.page.post_text,
        table=draw.page.table,
        question=ask(metric, draw.slots, draw.phrasing),
        answer=label(metric.formula, draw),
        program=metric.formula.program(draw.operands),
        family=metric.name,
        family_kind=metric.kind,
    )
    return Row(question, metric.formula.code(draw.operands), draw, number)


def in_turn(part: str, draws: Sequence[Draw], metrics: Sequence[Metric]) -> list[Row]:
    return [asked(part, number, draw, metrics[number % len(metrics)]) for number, draw in enumerate(draws)]


def label(formula: Formula, draw: Draw) -> str:
    """The answer as FinQA has labels: a number of at most five decimals."""
    answer = execute(formula.program(draw.operands), draw.page.table)
    assert isinstance(answer, float), formula
    return str(round(answer, 5))


def defined_once(part: str, draws: Sequence[Draw], names: Sequence[str], rng: Random) -> list[Row]:
    """A row for every draw, of a metric of its own whose definition comes first and is no formula of `pool`."""
    rows = []
    for number, (draw, name) in enumerate(zip(draws, names, strict=True)):
        operands = [float(operand) for operand in draw.operands]
        formula = rng.choice([one for one in further_pool() if sound_value(one, operands) is not None])
        metric = Metric(name, "defined", formula)
        rows.append(with_definition(asked(part, number, draw, metric), metric))
    return rows


def with_definition(row: Row, metric: Metric) -> Row:
    """The row with the metric's definition before its question."""
    assert row.draw, row
    text = ask_with_definition(metric, row.draw.slots, row.draw.operands, row.draw.phrasing)
    return replace(row, question=replace(row.question, question=text))


def look_up(part: str, number: int, draw: Draw, metric: Metric, rng: Random) -> Row:
    """The draw's page with one more row, which bears the metric's name, asked for one of its cells."""
    page, table = draw.page, [list(line) for line in draw.page.table]
    like = table[page.rows[draw.slots.row]]
    cells = [fresh(cell, rng) if column in page.columns.values() else "" for column, cell in enumerate(like)]
    table.insert(rng.randint(1, len(table)), new := [row_name(metric), *cells[1:]])
    wanted = replace(page, table=table, rows={row_name(metric): table.index(new)})
    value = literal(wanted.cell(row_name(metric), draw.slots.year))
    question = Question(
        id=f"{part}/{number:05d}-{metric.name}",
        pre_text=page.pre_text,
        post_text=page.post_text,
        table=table,
        question=ask_for_a_row(metric, draw.slots, draw.phrasing),
        answer=str(float(value)),
        program=f"add({value}, const_0)",
        family=metric.name,
        family_kind="look-up",
    )
    return Row(question, f"value = {value}\nans = value", draw, number)


def fresh_draw(draw: Draw, rng: Random, formulas: Sequence[Formula]) -> Draw:
    """The draw on its page with fresh numbers, drawn until all labels are apart again."""
    for _ in range(FRESH_TRIES):
        new = replace(draw, page=with_fresh_numbers(draw.page, rng))
        if labels_apart(formulas, [float(operand) for operand in new.operands]):
            return new
    raise UserError(f"no fresh numbers keep the labels apart on the page that begins {draw.page.pre_text[:60]!r}")


def ordinary_rows(questions: Iterable[Question], source: str, held_out: set[str], n: int, rng: Random) -> list[Row]:
    """`n` of the source's own training questions whose program gives the label, off the pages that are held out."""
    usable = [q for q in questions if page_key(q.table) not in held_out and gives_label(q)]
    replies = ProgramTeacher(dataset(source).program_style)(usable)
    made = (
        Row(replace(q, family="ordinary", family_kind="ordinary"), reply.code)
        for q, reply in zip(usable, replies, strict=True)
        if reply.code
    )
    rows = list({(row.prompt, row.code): row for row in made}.values())  # some questions stand there twice
    if len(rows) < n:
        raise UserError(f"{source} has only {len(rows)} of {n} training questions with a program on pages of their own")
    return rng.sample(rows, n)


def gives_label(question: Question) -> bool:
    """Whether the gold program is there and gives the label."""
    try:
        return match(execute(question.program, question.table), question.answer, "strict")
    except ProgramError:
        return False
