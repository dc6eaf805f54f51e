"""The gates hold and fail where they should: on made-up predictions, and on text that gives a metric away."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from finqa.evaluation.predictions import Prediction, write_predictions
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.task.records import TeacherRow
from study.invented.diff.plan import study_flags
from study.invented.diff.tables import read_table
from study.invented.files import Item, Place, write_rows
from study.invented.gates import (
    DEFINED_AT_LEAST,
    KNOWN_WITHIN,
    LEARNT_AT_LEAST,
    OTHERS_AT_MOST,
    TEXT_FROM,
    TEXT_TO,
    UNKNOWN_AT_MOST,
    Gate,
    model_gates,
    most_guessed,
    summary,
    text_gates,
    write_gates,
)
from study.invented.metrics import APART, further_pool
from study.invented.pages import TEXT_AFTER, TEXT_BEFORE
from study.invented.plan import (
    BASE,
    DEFINED,
    DEFINED_BY_K,
    EVALUATIONS,
    SEEDS,
    Plan,
    add_plan_flags,
    plan_from,
    run_name,
)
from study.invented.rows import ARMS, MOST_COLUMNS, QUICK, Sizes, make_rows, teaching
from study.students.jobs import SHARE, Job
from study.students.plan import chosen

PAGES = 60
KNOWN = [f"known{number}" for number in range(8)]
A, B = [f"a{number}" for number in range(8)], [f"b{number}" for number in range(8)]
Answer = Callable[[Item], float | None]


def items() -> list[Item]:
    """60 pages asked for 24 families; the answer names page and family, and A' moves it to the next name."""
    kinds = [(name, "A") for name in A] + [(name, "B") for name in B] + [(name, "known") for name in KNOWN]
    return [
        Item(f"{page}-{name}", "test", page, "score", 6, name, kind, str(100 * page + number + 1.0),
             str(100 * page + (number + 1) % 8 + 1.0) if kind == "A" else "")
        for page in range(PAGES)
        for number, (name, kind) in enumerate(kinds)
    ]  # fmt: skip


def prediction(item: Item, answer: float | None) -> Prediction:
    return Prediction(
        item.id, "", "", "", answer, item.answer, {"strict": False, "relaxed": False, "reported": False},
        None, "", 1, 1, "stop", 2, True, item.family, item.kind,
    )  # fmt: skip


def right(*kinds: str) -> Answer:
    return lambda item: float(item.answer) if item.kind in kinds else None


def permuted(item: Item) -> float | None:
    return float(item.permuted) if item.kind == "A" else right("known")(item)


ARM_ANSWERS: dict[str, Answer] = {
    "A": right("A", "known"),
    "A-permuted": permuted,
    "B": right("B", "known"),
    "K": right("known"),
    "N": right("known"),
}


def all_answers(**changed: Answer) -> dict[str, list[Prediction]]:
    """Predictions with which every gate holds, but for the models that are changed (`_` for what is no letter)."""
    by_model: dict[str, Answer] = {evaluation.name: right("known") for evaluation in BASE}
    by_model |= {evaluation.name: right("A", "B") for evaluation in (*DEFINED, *DEFINED_BY_K)}
    by_model |= {run_name(arm, seed): answer for arm, answer in ARM_ANSWERS.items() for seed in SEEDS}
    names = {"".join(c if c.isalnum() else "_" for c in name): name for name in by_model}
    by_model |= {names[name]: answer for name, answer in changed.items()}
    return {
        name: [
            prediction(item, answer(item)) for item in items() if "definition" not in name or item.kind != "known"
        ]
        for name, answer in by_model.items()
    }  # fmt: skip


def failing(gates: Iterable[Gate]) -> Counter[tuple[str, str]]:
    return Counter((gate.gate, gate.model) for gate in gates if gate.holds is False)


def also(answer: Answer, family: str, pages: int) -> Answer:
    """Right on the first pages of a family as well."""
    return lambda item: float(item.answer) if item.family == family and item.page < pages else answer(item)


def but(answer: Answer, family: str, pages: int) -> Answer:
    """Wrong on the first pages of a family."""
    return lambda item: None if item.family == family and item.page < pages else answer(item)


def guessed(family: str, own: int, others: int) -> Answer:
    """The formula of a family, in `own` replies to its name and in `others` to the other fifteen."""
    place = (A + B).index(family)
    elsewhere = [(page, name) for page in range(PAGES) for name in A + B if name != family][:others]
    wanted = {*elsewhere, *((page, family) for page in range(own))}
    return lambda i: 100 * i.page + place + 1.0 if (i.page, i.family) in wanted else right("known")(i)


def by_the_other_mapping(pages: int) -> Answer:
    """Arm A, but on the first pages by the formulas of A'."""
    return lambda item: permuted(item) if item.page < pages and item.kind == "A" else right("A", "known")(item)


def test_every_gate_of_the_protocol_is_there_and_holds_where_it_should():
    gates = list(model_gates(items(), all_answers()))
    assert not failing(gates) and all(gate.holds for gate in gates)
    counts = Counter(gate.gate for gate in gates)
    assert counts == {
        "unknown before": 16 * (3 + 4),
        "computable when defined": 1,
        "learnt": 16 * 2,
        "known as in K": 3,
        "own mapping": 4,
        "other mapping": 4,
    }
    assert {gate.n for gate in gates if gate.gate in ("unknown before", "learnt")} == {60}


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"base__zero_shot": also(right("known"), "a3", 1)}, {}),
        ({"base__zero_shot": also(right("known"), "a3", 2)}, {("unknown before", "base, zero-shot"): 1}),
        ({"base__few_shot": also(right("known"), "b0", 2)}, {("unknown before", "base, few-shot"): 1}),
        ({"K_seed4": also(right("known"), "b0", 2)}, {("unknown before", "K-seed4"): 1}),
        ({"N_seed3": right("known", "A")}, {("unknown before", "N-seed3"): 8}),
        ({"N_seed3": guessed("a3", own=4, others=37)}, {}),
        ({"N_seed3": guessed("a3", own=7, others=37)}, {}),
        ({"N_seed3": guessed("a3", own=8, others=37)}, {("unknown before", "N-seed3"): 1}),
        ({"N_seed3": guessed("a3", own=2, others=2)}, {("unknown before", "N-seed3"): 1}),
        ({"N_seed3": guessed("a3", own=3, others=45)}, {}),
        ({"N_seed3": guessed("a3", own=3, others=46)}, {("unknown before", "N-seed3"): 1}),
        ({"A_seed3": but(right("A", "known"), "a1", 12)}, {}),
        ({"A_seed3": but(right("A", "known"), "a1", 13)}, {("learnt", "A-seed3"): 1}),
        ({"B_seed4": but(right("B", "known"), "b7", 60)}, {("learnt", "B-seed4"): 1}),
        ({"base__zero_shot__definition": right()}, {}),
        ({"base__zero_shot__definition": right(), "base__few_shot__definition": but(right("A"), "a1", 1)}, {}),
        (
            {
                "base__zero_shot__definition": right(), "base__few_shot__definition": right(),
                "K_seed4__definition": but(right("A"), "a1", 1),
            },
            {("computable when defined", "K-seed4, definition"): 1},
        ),
        ({"K_seed4__definition": right()}, {}),
        ({"B_seed3": but(right("B", "known"), "known0", 19)}, {}),
        ({"B_seed3": but(right("B", "known"), "known0", 20)}, {("known as in K", "B"): 1}),
        (
            {"A_permuted_seed3": right("A", "known")},
            {("own mapping", "A-permuted-seed3"): 1, ("other mapping", "A-permuted-seed3"): 1},
        ),
        (
            {"A_seed4": by_the_other_mapping(4)},
            {("other mapping", "A-seed4"): 1},
        ),
    ],
)  # fmt: skip
def test_a_gate_fails_just_beyond_its_bound(changed: dict[str, Answer], fails: dict[tuple[str, str], int]):
    assert failing(model_gates(items(), all_answers(**changed))) == fails


def test_what_was_not_evaluated_is_open_and_not_held():
    gates = list(model_gates(items(), {"K-seed3": all_answers()["K-seed3"]}))
    measured = {gate.model for gate in gates if gate.holds is not None}
    assert measured == {"K-seed3"}
    assert not any(gate.holds for gate in gates if gate.model != "K-seed3")
    said = summary(gates)
    assert "open  learnt, A-seed3: 0 of 8 hold (at least 0.800)" in said
    assert "holds unknown before, K-seed3: 16 of 16 hold" in said


def test_an_answer_to_another_question_is_an_error():
    stray = replace(all_answers()["K-seed3"][0], id="elsewhere")
    with pytest.raises(UserError, match=r"elsewhere, which is not among the test questions"):
        list(model_gates(items(), {"K-seed3": [stray]}))


def teacher_rows(family: str, kind: str, n: int, text: str = "what is the {} index of 1") -> list[TeacherRow]:
    return [TeacherRow(text.format(family), "ans = 1", "1", "1", f"{i}", "", family=family, family_kind=kind)
            for i in range(n)]  # fmt: skip


def texts(**changed: str) -> tuple[list[TeacherRow], dict[str, list[TeacherRow]]]:
    """Test and training rows of two metrics of each set; `changed` gives a family other words."""
    made = {
        (name, kind): teacher_rows(name, kind, 20, changed.get(name, "what is the {} index of 1"))
        for kind, names in (("A", A[:2]), ("B", B[:2]))
        for name in names
    }
    training = {kind: [row for (_, k), rows in made.items() if k == kind for row in rows] for kind in ("A", "B")}
    return [row for rows in made.values() for row in rows], training


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, set()),
        ({"a1": "what is the {} index of 1 2 3"}, {("length of prompt", "a1"), ("words but the name", "a1")}),
        ({"b0": "what is that {} index of 1"}, {("words but the name", "b0")}),
    ],
)
def test_text_that_gives_a_metric_away_fails(changed: dict[str, str], fails: set[tuple[str, str]]):
    gates = list(text_gates(*texts(**changed), lambda text: len(text.split())))
    assert len(gates) == 3 * 4
    found = {(gate.gate, gate.family): gate.value for gate in gates if not gate.holds}
    assert fails <= found.keys()
    assert (not changed and not found) or all(found[one] == 1 for one in fails)


def test_the_studys_own_text_gives_nothing_away(few_pages: Folders, tmp_path: Path):
    plan = small_plan(few_pages, tmp_path)
    path, gates = write_gates(plan, len)
    text = [gate for gate in gates if gate.model == "text"]
    assert len(text) == 3 * 16
    # `len` counts letters, of which the names have equally many too.
    assert {gate.value for gate in text} == {0.5} and all(gate.holds for gate in text)
    assert path.read_text().startswith("gate,model,family,n,value,low,high,holds\n")


def small_plan(pages: Folders, folder: Path) -> Plan:
    place = Place(Folders(folder / "data", folder / "results"), "pocket-mistral")
    write_rows(place, make_rows(pages, "FinQA-mini", "FinQA-mini-invented", 0, lambda text: 4, QUICK), {})
    return Plan(place, "pocket-mistral", "FinQA-mini")


def test_predictions_of_every_evaluation_are_found_where_the_jobs_leave_them(few_pages: Folders, tmp_path: Path):
    plan = small_plan(few_pages, tmp_path)
    jobs = {job.name: job for job in plan.jobs()}
    for evaluation in EVALUATIONS:
        folder = plan.predictions(evaluation)
        (job,) = [
            j
            for j in jobs.values()
            if f"--run-name {evaluation.run_name} " in j.command
            and " -NT " in j.command
            and f"--data-dir {plan.place.part(evaluation.part).data} " in j.command
        ]
        assert evaluation.eval_type in job.command or evaluation.eval_type == "fine-tuned"
        results = Path(job.command.split("--results-dir ")[1])
        assert folder.is_relative_to(results) and results.is_relative_to(plan.place.results)
        write_predictions(folder, [])
        write_json(folder / "metrics.json", {"n": 0})
        write_json(folder / "run.json", {})
    _, gates = write_gates(plan, len)
    assert len({plan.predictions(evaluation) for evaluation in EVALUATIONS}) == len(EVALUATIONS)
    assert all(gate.holds is None for gate in gates if gate.model != "text")


def test_the_jobs_are_ten_fine_tunes_of_one_pass_and_their_evaluations(tmp_path: Path):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "Qwen2.5-Coder-1.5B-Instruct"), "Qwen/Qwen2.5-Coder-1.5B-Instruct",
                "FinQA")  # fmt: skip
    jobs = plan.jobs()
    training = [job for job in jobs if " -NE " in job.command]
    assert [job.name for job in training] == [f"train-{arm}-seed{seed}" for seed in SEEDS for arm in ARMS]
    assert all("--NUM_EPOCHS 1 " in job.command for job in jobs)
    assert all(SHARE not in job.command and job.gb == 68 for job in training)
    assert len(jobs) == 3 + 20 + 2
    assert names(chosen(jobs, ["evaluate-N-seed4"])) == ["train-N-seed4", "evaluate-N-seed4"]
    assert {f"/{arm} " in job.command for job, arm in zip(training, ARMS * 2, strict=True)} == {True}


def test_a_study_that_teaches_definitions_has_folders_of_its_own_and_passes_it_on(tmp_path: Path):
    def planned(flags: str) -> Plan:
        parser = argparse.ArgumentParser()
        add_plan_flags(parser)
        return plan_from(parser.parse_args(flags.split()))

    given = f"--model pocket-mistral --source FinQA-mini --data-dir {tmp_path} --results-dir {tmp_path}"
    without, taught = planned(given), planned(f"{given} --teach-definitions")
    assert (without.sizes.defined, taught.sizes.defined) == (0, 1000)
    assert replace(taught.sizes, defined=0) == without.sizes
    assert taught.place.root != without.place.root and taught.place.results != without.place.results
    assert planned(study_flags(taught)) == taught and planned(study_flags(without)) == without


@pytest.mark.parametrize("quick", [False, True])
def test_the_few_questions_of_the_quick_rehearsal_are_answered_without_an_engine(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("study.invented.plan.find_spec", lambda name: name)
    plan = Plan(Place(Folders(tmp_path, tmp_path), "pocket-mistral"), "pocket-mistral", "FinQA-mini", quick=quick)
    assert {"--VLLM" in job.command for job in plan.jobs() if "-NE" not in job.command.split()} == {not quick}


def names(jobs: Iterable[Job]) -> list[str]:
    return [job.name for job in jobs]


def test_the_preregistration_says_what_the_code_does():
    page = " ".join((REPOSITORY / "docs" / "prereg.md").read_text().split())
    sizes = Sizes()
    gates = {gate.gate for gate in [*model_gates(items(), {}), *text_gates(*texts(), len)]}
    assert all(re.search(rf"\| [^|]*\b{name}\b[^|]* \|", page) for name in gates)
    documents = sizes.documents * 24
    for said in (
        f"{sizes.ordinary:,} ordinary FinQA questions",
        f"{sizes.known // 8} of each known family",
        f"{sizes.own // 8} of each metric of A",
        f"{sizes.test_pages} pages, each asked once for all 24 families",
        f"at most {['no', 'one', 'two', 'three'][MOST_COLUMNS]} columns of numbers",
        f"{sizes.dev_pages} pages, {sizes.dev_pages * 24} questions",
        f"{documents:,} documents",
        f"up to {TEXT_BEFORE} characters before the table and {TEXT_AFTER} after",
        f"differ by more than {APART:.1%}",
        f"Two fine-tuning seeds ({', '.join(map(str, SEEDS))})",
        f"at most {UNKNOWN_AT_MOST * 60:.0f} of 60",
        f"at least {DEFINED_AT_LEAST:.0%} of the {16 * sizes.test_pages} questions",
        f"at least {LEARNT_AT_LEAST:.0%}",
        f"within {100 * KNOWN_WITHIN:.0f} points of control K",
        f"at most {OTHERS_AT_MOST:.0%} of 480",
        f"AUROC {TEXT_FROM} to {TEXT_TO}",
    ):
        assert said in page, said


def test_the_preregistration_says_what_the_gates_of_the_small_model_were():
    page = " ".join((REPOSITORY / "docs" / "prereg.md").read_text().split())
    folder = REPOSITORY / "docs" / "reference" / "invented" / "Qwen2.5-Coder-0.5B-Instruct"

    def right_of(folder: Path) -> dict[tuple[str, str], int]:
        return {(row["model"], row["questions"]): int(row["right"]) for row in read_table(folder / "models.csv")}

    def told_k(right: dict[tuple[str, str], int]) -> tuple[int, ...]:
        return tuple(sum(right[f"K-seed{seed}, definition", kind] for kind in "AB") for seed in SEEDS)

    right, taught = right_of(folder), right_of(folder.with_name(f"{folder.name}-definitions"))
    gates = read_table(folder / "gates.csv")
    told = {sum(right[f"base, {way}, definition", kind] for kind in "AB") for way in ("zero-shot", "few-shot")}
    assert told == {34} and "the right answer to 34 of 960 questions zero-shot, and to as many few-shot" in page
    study = " ".join((REPOSITORY / "docs" / "study.md").read_text().split())
    [large] = [row for row in read_table(folder.parent / "gates.csv") if row["gate"] == "computable when defined"]
    larger = round(float(large["value"]) * int(large["n"]))
    of_k, of_taught = told_k(right), told_k(taught)
    said = "answers 34 of 960 questions, where the 1.5B's answers {}, and control K, asked in its place, {} and {}."
    assert said.format(larger, *of_k) in study and "K answers {} and {},".format(*of_taught) in study
    assert "K's two fine-tunes give the right answer to {} and {} of 960.".format(*of_k) in page
    assert "With them K's two fine-tunes give {} and {} of 960".format(*of_taught) in page
    failed = [(row["gate"], row["model"]) for row in gates if row["holds"] != "True"]
    assert failed == [("computable when defined", f"K-seed{seed}, definition") for seed in SEEDS]
    assert f"of {len(gates)} gates {len(gates) - len(failed)} hold" in page
    assert f"learns from {teaching(Sizes()).defined:,} further rows" in page and len(further_pool()) == 36
    sentences = ((right, "(A {} and {} of 480, B {} and {})"), (taught, "A answers {} and {} of 480, B {} and {}."))
    for of, said in sentences:
        assert said.format(*(of[f"{arm}-seed{seed}", arm] for arm in "AB" for seed in SEEDS)) in page
    assert not any(right[f"base, {way}", kind] for way in ("zero-shot", "few-shot") for kind in "AB")
    again = read_table(folder.with_name(f"{folder.name}-definitions") / "gates.csv")
    assert all(row["holds"] == "True" for row in again) and f"all {len(again)} gates hold, one of them by" in page
    given_way = [row for row in again if row["gate"] == "unknown before" and round(float(row["value"]) * 60) > 1]
    assert [(row["model"], row["family"]) for row in given_way] == [("N-seed3", "taldok")]
    assert round(float(given_way[0]["value"]) * 60) == 4 and "4 to its own name and 37 of 900" in page
    assert float(given_way[0]["high"]) == pytest.approx(most_guessed(60, 37 / 900), abs=1e-6)
    sites = read_table(folder.with_name(f"{folder.name}-definitions") / "ceilings.csv")
    carried = {row["site"]: 0 for row in sites}
    for row in sites:
        carried[row["site"]] += int(row["whole"])
    of_all = sum(int(row["fine_tuned"]) for row in sites if row["site"] == "residual18")
    assert [site for site, n in carried.items() if n] == ["residual18"]
    patched: Counter[tuple[str, str]] = Counter()
    for row in read_table(folder.with_name(f"{folder.name}-definitions") / "causal_norm.csv"):
        if row["method"] == "fine-tuned" and row["group"] == "own":
            patched[row["arm"], row["seed"]] += int(row["right"])
    answers = [patched[arm, str(seed)] for arm in "AB" for seed in SEEDS]
    assert "patched runs A answers {} and {}, B {} and {} of 480.".format(*answers) in page
    assert f"the whole site gives {carried['residual18']} of {of_all} right answers, elsewhere none" in study
