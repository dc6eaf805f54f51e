"""What a whole site carries, before any dictionary: right answers of programs that the patched base writes.

The fine-tuned model's activation at a site is put into the base under the base's own later layers, and the questions of
the dev pages for the arm's own metrics are answered. The primary site is the earliest that gives HALF of the right
answers of the fine-tuned model itself, arms and seeds together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.activations.readers import Target, in_the_models_dtype
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.progress import say
from finqa.sandbox.running import Sandbox
from finqa.task.records import TeacherRow, read_teacher_rows
from study.invented.diff.plan import ADDED, PAIRS, Compared, Lengths, last_resort, lengths, site_name, sites
from study.invented.files import TEST, Item, read_items
from study.invented.plan import Plan
from study.work import read_json

if TYPE_CHECKING:
    from crosscoder.interventions.causal import Cell
    from crosscoder.interventions.halves import Pair
    from finqa.evaluation.generation import Reply

HALF = 0.5
Row = dict[str, Any]
Asked = Sequence[tuple[Item, TeacherRow]]
"""Questions, each with its row."""


@dataclass(frozen=True)
class Models:
    """The base and a fine-tune of it in memory."""

    pair: Pair
    adapted: Any
    """The PeftModel that both are."""
    tokenizer: Any
    lengths: Lengths

    def right(self, target: Target, sets: Sequence[tuple[Cell, Asked]]) -> list[list[bool]]:
        """Whether the answer of each program that the patched model writes is the label, by the strict rule.

        Args:
            sets: Each patch with the questions that it is asked; those of one direction and carrier write together.

        Returns:
            A list for each set, in the order of its questions.
        """
        from crosscoder.interventions.patched_generation import answered, replies_of_cells

        n_programs = sum(len(asked) for _, asked in sets)
        say(f"writing {n_programs:,} programs with {len(sets)} patches of {site_name(target)}")
        together: dict[tuple[str, str], list[int]] = {}
        for number, (cell, _) in enumerate(sets):
            together.setdefault((cell.direction, cell.carrier), []).append(number)
        written: dict[int, list[Reply]] = {}
        for numbers in together.values():
            prompted = [(cell, [self._prompt(row) for _, row in asked]) for cell, asked in (sets[i] for i in numbers)]
            found = replies_of_cells(
                self.pair, target, prompted, self.tokenizer, self.lengths.max_new_tokens, self.lengths.batch
            )
            written |= dict(zip(numbers, found, strict=True))
        replies = [reply for number in range(len(sets)) for reply in written[number]]
        expected = [item.answer for _, asked in sets for item, _ in asked]
        with Sandbox() as sandbox:
            right = iter(answered(replies, expected, sandbox).right)
        return [list(islice(right, len(asked))) for _, asked in sets]

    def _prompt(self, row: TeacherRow) -> list[int]:
        return students.prompt_ids(self.tokenizer, [{"role": "user", "content": row.prompt}])


def load_models(plan: Plan, compared: Compared) -> Models:
    """In bf16 on a GPU, else in fp32."""
    import torch

    from crosscoder.interventions.halves import pair_of

    say(f"loading the base and {compared.run}")
    device = students.default_device()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    base = students.load_base(plan.model, dtype, device)
    adapter = students.find_adapter(plan.student(compared.run), plan.place.part(TEST))
    adapted = students.load_adapter(base, adapter).eval()
    in_the_models_dtype(adapted, dtype)
    return Models(pair_of(adapted), adapted, students.load_tokenizer(plan.model), lengths(plan))


def asked_of(plan: Plan, split: str, kinds: Iterable[str]) -> list[tuple[Item, TeacherRow]]:
    """The questions of a split for metrics of these sets, each with its row, page after page."""
    rows = {row.id: row for row in read_teacher_rows(plan.place.part(TEST).filtered(plan.dataset, split))}
    kinds = set(kinds)
    return [(item, rows[item.id]) for item in read_items(plan.place) if item.split == split and item.kind in kinds]


def ceilings_path(plan: Plan, compared: Compared) -> Path:
    return plan.place.results / "ceilings" / f"{compared.run}.json"


def measure_ceilings(plan: Plan, compared: Compared) -> str:
    """Write the right answers of one fine-tune at every site; returns a line that says them."""
    from crosscoder.interventions.causal import Cell
    from crosscoder.interventions.sets import Nothing, Whole

    path = ceilings_path(plan, compared)
    if not path.exists():
        models, asked = load_models(plan, compared), asked_of(plan, "dev", [compared.arm])
        alone = {"arm": compared.arm, "seed": compared.seed, "n": len(asked)}
        last = last_resort(plan)
        ends = (Cell(Nothing(), "sufficiency", "own"), Cell(Nothing(), "necessity", "own"))
        base, fine_tuned = (sum(right) for right in models.right(last, [(cell, asked) for cell in ends]))
        rows = [
            {
                **alone,
                "site": name,
                "layer": target.layer,
                "base": base,
                "fine_tuned": fine_tuned,
                "whole": sum(models.right(target, [(Cell(Whole(), "sufficiency", "own"), asked)])[0]),
            }
            for name, target in sites(plan).items()
        ]
        write_json(path, {"rows": rows})
    return "; ".join(f"{row['site']} {row['whole']} of {row['fine_tuned']}" for row in read_json(path)["rows"])


def ceiling_rows(plan: Plan) -> list[Row]:
    """The lines of ceilings.csv that are there."""
    paths = [ceilings_path(plan, pair) for pair in PAIRS if pair.arm in ADDED]
    return [row for path in paths if path.exists() for row in read_json(path)["rows"]]


def primary_name(rows: Sequence[Row], otherwise: str) -> str:
    """The site of the lowest layer whose `whole` is at least HALF of `fine_tuned`, over all rows; else `otherwise`.

    Of an MLP and a residual stream of one layer the MLP is the earlier.
    """
    found: dict[str, list[int]] = {}
    for row in sorted(rows, key=lambda row: (int(row["layer"]), row["site"].startswith("residual"))):
        whole, fine_tuned = found.setdefault(row["site"], [0, 0])
        found[row["site"]] = [whole + int(row["whole"]), fine_tuned + int(row["fine_tuned"])]
    enough = (name for name, (whole, fine_tuned) in found.items() if fine_tuned and whole >= HALF * fine_tuned)
    return next(enough, otherwise)


def primary_site(plan: Plan) -> Target:
    """The site that the ceilings of both arms in both seeds choose; UserError where some are missing."""
    rows = ceiling_rows(plan)
    wanted = {(pair.arm, pair.seed) for pair in PAIRS if pair.arm in ADDED}
    missing = wanted - {(row["arm"], row["seed"]) for row in rows}
    if missing:
        raise UserError(f"no ceilings of {sorted(missing)}; measure them with: python -m study.invented ceilings")
    return sites(plan)[primary_name(rows, site_name(last_resort(plan)))]
