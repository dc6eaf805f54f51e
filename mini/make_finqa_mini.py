"""Make FinQA-mini: synthetic questions over synthetic earnings reports, in FinQA's raw schema.

    python -m mini.make_finqa_mini                        # the shipped files, byte for byte
    python -m mini.make_finqa_mini --kinds known,other --data-dir DIR     # data for another fine-tune
    python -m mini.make_finqa_mini --minimal-pairs 200 --data-dir DIR     # the pairs split

Writes D/FinQA-mini/{train,dev,test}.json, a record a line. Each record's `qa` has its `family` and `family_kind`
besides FinQA's own fields; the label `exe_ans` is the program's result. A split of minimal pairs, `pairs.json`, asks
several families the same thing of the same page, rows and years; `qa.pair` joins them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import SHIPPED_DATA, write_atomically
from finqa.task.programs import execute
from mini.asking import ask, choose_slots
from mini.families import FAMILIES, Family, Kind, Slots, families
from mini.pages import Page, make_page

SEED = 1
SIZES = {"train": 5000, "dev": 400, "test": 800}
NEW_SHARE = {"train": 0.6, "dev": 0.5, "test": 0.5}
"""Share of questions whose family is held out of pretraining. Training has more of them: they are what is learnt."""
NAME = "FinQA-mini"


def make_split(split: str, size: int, kinds: tuple[Kind, ...], seed: int) -> list[dict[str, Any]]:
    """`size` raw records, the families of each kind equally often; the same arguments give the same records."""
    order = Random(f"{seed}/{split}/families")
    known = families("known")
    held_out = [family for kind in kinds if kind != "known" for family in families(kind)]
    n_held_out = round(size * NEW_SHARE.get(split, 0.5)) if held_out else 0
    n_held_out = n_held_out if "known" in kinds else size
    chosen = [held_out[i % len(held_out)] for i in range(n_held_out)]
    chosen += [known[i % len(known)] for i in range(size - n_held_out)]
    order.shuffle(chosen)
    return [
        make_record(f"{NAME}/{split}/{index:05d}", family, Random(f"{seed}/{split}/{index}"))
        for index, family in enumerate(chosen)
    ]


def make_record(record_id: str, family: Family, rng: Random) -> dict[str, Any]:
    """One question of `family` over a page of its own."""
    page = make_page(rng, family.facts)
    slots = choose_slots(rng, page, family)
    phrasing = rng.randrange(len(family.phrasings))
    return _record(record_id, page, page.text(rng), family, slots, phrasing)


def make_minimal_pairs(n_pages: int, seed: int) -> list[dict[str, Any]]:
    """Groups of questions that differ in the asked-for operation alone: page, rows and years are the same.

    Each page is asked every family of one shape, in each family's first phrasing.
    """
    records = []
    shapes = ("two years", "row", "two rows")
    for number in range(n_pages):
        rng = Random(f"{seed}/pairs/{number}")
        shape = shapes[number % len(shapes)]
        group = [family for family in FAMILIES if family.shape == shape]
        page = make_page(rng)
        # The choosiest family decides, so that every question of the group makes sense.
        chooser = next((f for f in group if f.name == "percentage_change"), group[0])
        slots, text = choose_slots(rng, page, chooser), page.text(rng)
        for family in group:
            record = _record(f"{NAME}/pairs/{number:05d}-{family.name}", page, text, family, slots, 0)
            record["qa"]["pair"] = number
            records.append(record)
    return records


def _record(
    record_id: str, page: Page, text: tuple[list[str], list[str]], family: Family, slots: Slots, phrasing: int
) -> dict[str, Any]:
    program = family.program(page, slots)
    answer = execute(program, page.table())
    answer = round(answer, 5) if isinstance(answer, float) else answer
    return {
        "id": record_id,
        "pre_text": text[0],
        "post_text": text[1],
        "table": page.table(),
        "qa": {
            "question": ask(family, slots, phrasing),
            "program": program,
            "exe_ans": answer,
            "answer": str(answer),
            "family": family.name,
            "family_kind": family.kind,
        },
    }


def as_json(records: list[dict[str, Any]]) -> str:
    """The file's text: a JSON list with a record a line."""
    return "[\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in records) + "\n]\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=SHIPPED_DATA, help="data folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="default: %(default)s")
    parser.add_argument("--kinds", default="known,new", help="of known, new, other (default: %(default)s)")
    for split, size in SIZES.items():
        parser.add_argument(f"--{split}", type=int, default=size, metavar="N", help="questions (default: %(default)s)")
    parser.add_argument("--minimal-pairs", type=int, metavar="PAGES", help="make only the pairs split")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    kinds = tuple(args.kinds.split(","))
    if not set(kinds) <= {"known", "new", "other"}:
        raise UserError(f"--kinds {args.kinds}: each is one of known, new, other")
    if args.minimal_pairs:
        splits = {"pairs": make_minimal_pairs(args.minimal_pairs, args.seed)}
    else:
        splits = {s: make_split(s, getattr(args, s), kinds, args.seed) for s in SIZES}
    for split, records in splits.items():
        path = args.data_dir / NAME / f"{split}.json"
        write_atomically(path, as_json(records))
        count = Counter(record["qa"]["family_kind"] for record in records)
        print(f"{path}: {len(records)} questions, {', '.join(f'{n} {kind}' for kind, n in sorted(count.items()))}")


if __name__ == "__main__":
    sys.exit(report_errors(main))
