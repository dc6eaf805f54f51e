"""Does a diff of two models find what fine-tuning added? Everything of docs/study.md, on FinQA-mini; `make study`.

    python -m study.pocket                 all pairs, methods, seeds and controls: about 90 minutes on two cores
    python -m study.pocket --quick         a rehearsal of minutes: fine-tunes that have learnt nothing, two methods
    python -m study.pocket --data-dir D --results-dir R --output docs/reference/study

Base, fine-tunes (three seeds), a sham fine-tune on as many questions of known families and one on other families are
made by main.py and scored; the ceilings of all layers and sites decide where activations are read; every pair of models
is read over the same documents; every method is trained, and left untrained, and trained with a frozen decoder, asked
for the families that were added, and put into the models.

Works in D/study/ and R/study/ (study-quick/ in a rehearsal), a log a command in R/study/logs/. Writes to the output
folder models.csv, ceilings.csv, dictionaries.csv, known_answer.csv, glance.csv, kinds.csv, matrix.csv, untrained.csv,
tokens.csv, probes.csv, causal.csv, causal_controls.csv, ceilings.png, glance.png, causal.png, run.json; and fills the
tables of docs/study.md where the output folder is the default one, else of study.md, a copy of it, in the output
folder.

A killed study goes on when it is started again: a model, an activation set, a dictionary, a measure that is there is
not made again (after a change of plan.py delete D/study and R/study). A fine-tune that `make demo` left in D is taken
as it is where its rows and settings are the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.runtime.errors import report_errors
from finqa.runtime.paths import REPOSITORY, Folders, add_folder_flags, write_atomically

if TYPE_CHECKING:
    from crosscoder.activations.readers import Target
    from study.pocket.dictionaries import Dictionary
    from study.pocket.measures import Asked
    from study.work import Work

OUTPUT = REPOSITORY / "docs" / "reference" / "study"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folder_flags(parser)
    parser.add_argument("--output", type=Path, help="tables and figures (default: docs/reference/study)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal; its figures mean nothing")
    args = parser.parse_args()
    # A rehearsal never takes the place of the study's figures.
    args.output = args.output or (args.results_dir / "study-quick" / "tables" if args.quick else OUTPUT)
    return args


def main() -> None:
    args = parse_args()
    from study.pocket.plan import FULL, QUICK, expected
    from study.work import Work

    plan = QUICK if args.quick else FULL
    folders = Folders(args.data_dir.resolve(), args.results_dir.resolve())
    work = Work(plan, folders, args.output.resolve())
    print(expected(plan), flush=True)
    started = time.perf_counter()
    study(work)
    print(f"the study in {time.perf_counter() - started:.0f} s (this call); tables and figures in {work.output}")


def study(work: Work) -> None:
    """Every step, in the order in which the next ones need them."""
    from study.pocket import causes, ceilings, dictionaries, measures, models, pairs

    models.make_rows(work)
    models.make_models(work)
    models.score_models(work)
    found = ceilings.measure_ceilings(work, work.plan.pairs[0].fine_tuned)
    target, why = ceilings.choose_site(found)
    print(f"layer and site: {why}", flush=True)
    trained = dictionaries.dictionaries(work.plan, target)
    sites = [(pair, dictionaries.targets_of(work.plan, pair, target)) for pair in work.plan.pairs]
    pairs.collect_all(work, [pairs.Recording(pair, site) for pair, its in sites for site in its])
    measures.predict_all(work)
    dictionaries.train_all(work, trained)
    asked = measures.subjects(work, trained, target)
    measures.answer_all(work, asked)
    causes.causal_all(work, trained, target)
    write(work, found, why, target, trained, asked)


def write(
    work: Work,
    found: list[dict[str, Any]],
    why: str,
    target: Target,
    trained: list[Dictionary],
    asked: list[Asked],
) -> None:
    """CSVs, figures, page and manifest."""
    from finqa.runtime.manifest import write_manifest
    from study import page
    from study.pocket import causes, ceilings, dictionaries, figures, measures, models, tables
    from study.pocket.plan import BASE, FINE_TUNED, SHOWN_STRATUM
    from study.work import step

    with step("tables and figures") as say:
        answers = measures.answers(work, asked)
        patches, controls = causes.csv_rows(work, trained, target)
        repeated = f"{BASE.name} -> {FINE_TUNED.name}"
        rows = {
            "models": models.accuracy_rows(work),
            "ceilings": ceilings.csv_rows(found),
            "dictionaries": dictionaries.quality_rows(work, trained),
            "known_answer": tables.answer_rows(answers),
            "glance": tables.glance_rows(answers),
            "kinds": tables.kind_rows(answers),
            "matrix": tables.matrix_rows(answers),
            "untrained": tables.untrained_rows(answers, patches, repeated),
            "tokens": [*tables.token_rows(answers), *measures.reading_rows(work, asked)],
            "probes": tables.probe_rows(answers),
            "causal": patches,
            "causal_controls": controls,
        }
        for name, its in rows.items():
            tables.write_csv(work.output / f"{name}.csv", its)
        figures.draw_ceilings(tables.read_csv(work.output / "ceilings.csv"), work.output / "ceilings.png")
        figures.draw_glance(tables.read_csv(work.output / "kinds.csv"), work.output / "glance.png", SHOWN_STRATUM)
        figures.draw_recovered(patches, work.output / "causal.png")
        write_manifest(work.output / "run.json", {"plan": work.plan}, site=list(target), why=why)
        filled = page.fill(page.PAGE.read_text(), work.output, "pocket")
        write_atomically(page.PAGE if work.output == OUTPUT.resolve() else work.output / "study.md", filled)
        say(f"{len(rows)} tables, 3 figures")


if __name__ == "__main__":
    sys.exit(report_errors(main))
