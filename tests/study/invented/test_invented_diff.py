"""The second half's parts: the primary site, what an item tells of a metric, when a dictionary has converged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finqa.models.students import load_tokenizer
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY, Folders
from finqa.task.records import TeacherRow
from study.invented.diff import dictionaries, pairs
from study.invented.diff.carrying import Carrier, first_of, of_first_pages
from study.invented.diff.ceilings import HALF, primary_name
from study.invented.diff.items import (
    Board,
    auroc_elsewhere,
    best_items,
    board,
    item_rows,
    question_means,
    read_elsewhere,
    recall_at,
    within_page_auroc,
)
from study.invented.diff.plan import (
    ANY_ITEM,
    BASELINES,
    BY_RUN,
    ENERGY,
    EQUAL_L0,
    FIRST,
    GAIN,
    METHODS,
    TOP,
    Lengths,
    diff_jobs,
    equal_l0,
    is_of,
    sites,
    slug,
    study_flags,
    subjects,
)
from study.invented.diff.readings import Looked, Looks, before_operation
from study.invented.diff.sources import Directions, principal, top
from study.invented.files import Item, Place, link_adapters
from study.invented.gates import Gate
from study.invented.plan import Plan
from study.students.plan import chosen


def ceiling(site: str, layer: int, whole: int, fine_tuned: int = 100) -> dict[str, Any]:
    return {"site": site, "layer": layer, "whole": whole, "fine_tuned": fine_tuned}


@pytest.mark.parametrize(
    ("rows", "site"),
    [
        ([ceiling("residual7", 7, 50), ceiling("residual14", 14, 90)], "residual7"),
        ([ceiling("residual7", 7, 49), ceiling("residual14", 14, 90)], "residual14"),
        ([ceiling("residual14", 14, 60), ceiling("residual7", 7, 60)], "residual7"),  # whatever their order
        ([ceiling("residual7", 7, 49), ceiling("residual14", 14, 49)], "residual21"),
        ([ceiling("residual15", 15, 60), ceiling("mlp15", 15, 60)], "mlp15"),
        ([ceiling("residual7", 7, 20), ceiling("residual7", 7, 80)], "residual7"),  # both fine-tunes together
        ([ceiling("residual7", 7, 0, 0)], "residual21"),  # half of nothing
    ],
)
def test_the_primary_site_is_the_earliest_that_gives_half(rows: list[dict[str, Any]], site: str):
    assert primary_name(rows, "residual21") == site


@pytest.mark.parametrize(
    ("model", "names"),
    [("pocket-mistral", ["residual1", "residual2", "mlp3", "residual4"])],
)
def test_the_sites_are_the_quarters_of_the_depth(model: str, names: list[str], tmp_path: Path):
    assert list(sites(Plan(Place(Folders(tmp_path), "m"), model, "FinQA-mini"))) == names


def test_the_sites_of_the_main_model_are_those_of_the_preregistration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("study.invented.diff.plan.model_depth", lambda model: 28)
    plan = Plan(Place(Folders(tmp_path), "m"), "Qwen/Qwen2.5-Coder-1.5B-Instruct", "FinQA")
    assert list(sites(plan)) == ["residual7", "residual14", "mlp15", "residual21"]


def test_a_pair_waits_for_the_fine_tunes_that_it_reads(tmp_path: Path):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "m"), "pocket-mistral", "FinQA-mini")
    jobs = {job.name: job for job in [*plan.jobs(), *diff_jobs(plan, study_flags(plan))]}
    settings = [f"settings-{slug(method)}" for method in METHODS]
    assert len(jobs) == 25 + 4 + 1 + len(METHODS) + 4 * (2 + 3 * len(METHODS) + 1) + 6 + 2
    assert jobs["settings-L1"].after == ("record-K-seed3",)
    trained = tuple(f"dictionaries-B-seed3-{slug(method)}" for method in METHODS)
    read = tuple(f"diff-B-seed3-{slug(method)}" for method in (BASELINES, *METHODS))
    assert jobs["dictionaries-A-seed4-L1"].after == ("record-A-seed4", "settings-L1", *read)
    assert {jobs[name].after for name in read} == {(*trained, "look-B-seed3")}
    assert jobs["look-B-seed3"].after == ("record-B-seed3", "train-B-seed3")
    read_too = ("train-A-seed3", "train-A-permuted-seed3", "train-N-seed3")
    assert jobs["look-A-seed3"].after[-3:] == read_too
    assert set(jobs["record-A-seed4"].after) >= set(trained) and not set(jobs["record-A-seed4"].after) & set(read)
    needed = {job.name for job in chosen(list(jobs.values()), ["diff-K-seed4"])}
    assert needed - {job.name for job in plan.jobs()} == {
        "diff-K-seed4", "record-K-seed3", *settings,
        *(f"ceilings-{arm}-seed{seed}" for arm in "AB" for seed in (3, 4)),
    }  # fmt: skip
    gates = {"base", "base-defined", "evaluate-K-seed3-definition", "evaluate-N-seed4"}
    assert gates <= needed  # no dictionary is trained before they are measured


def test_further_seeds_and_other_sites_are_of_the_pairs_whose_metrics_were_added(tmp_path: Path):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "m"), "pocket-mistral", "FinQA-mini", quick=True)
    jobs = [job.name for job in diff_jobs(plan, study_flags(plan))]
    added = ["A-seed3", "B-seed3"]
    assert [name for name in jobs if name.startswith("seeds")] == [
        f"seeds-{run}-{slug(method)}" for run in added for method in METHODS
    ]
    assert [name for name in jobs if name.startswith("sites")] == ["sites-A-seed3"]
    assert jobs.index("diff-B-seed3-L1") < jobs.index("seeds-A-seed3-L1") < jobs.index("diff-K-seed3")
    assert "ceilings-B-seed4" in jobs and not [name for name in jobs if name.startswith("diff") and "seed4" in name]
    assert {(one.form, one.seed) for one in subjects(plan, BY_RUN["A-seed3"], "seeds")} == {
        ("untrained", 1), ("trained", 1), ("frozen", 0)
    }  # fmt: skip


def test_another_model_than_the_main_one_is_read_in_the_short_form(tmp_path: Path):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "other"), "other/other", "FinQA-mini")
    jobs = [job.name for job in diff_jobs(plan, study_flags(plan))]
    runs = [f"{arm}-seed{seed}" for seed in (3, 4) for arm in "AB"]
    assert [name for name in jobs if name.startswith("diff")] == [
        f"diff-{run}-{slug(method)}" for run in runs for method in (BASELINES, *METHODS)
    ]
    assert [name for name in jobs if name.startswith("seeds")] == [
        f"seeds-{run}-{slug(method)}" for run in runs for method in METHODS
    ]
    assert {(one.form, one.seed) for one in subjects(plan, BY_RUN["A-seed3"], "seeds")} == {("frozen", 0)}
    assert not [name for name in jobs if name.startswith("sites")]


def test_every_subject_is_read_by_one_job_and_every_form_of_a_method_by_the_same(tmp_path: Path):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "m"), "pocket-mistral", "FinQA-mini", quick=True)
    every = [one for part in ("diff", "seeds") for one in subjects(plan, BY_RUN["A-seed3"], part)]
    read = {name: [one for one in every if is_of(one, name)] for name in (BASELINES, *METHODS)}
    assert sorted(one.name for own in read.values() for one in own) == sorted(one.name for one in every)
    assert {one.form for one in read[BASELINES]} == {"baseline"}
    assert all({one.method for one in read[name]} == {name} for name in METHODS)
    assert all(is_of(one, "") for one in every)


def asked(pages: int, metrics: Sequence[str] = ("x", "y", "z")) -> list[Item]:
    return [
        Item(f"{page}-{name}", "test", page, "choose" if page % 2 == 0 else "score", 6, name, "A", "1", "")
        for page in range(pages)
        for name in metrics
    ]


def made(scores: Sequence[Sequence[Sequence[float]]]) -> Board:
    """[items, pages, metrics]"""
    table = torch.tensor(scores, dtype=torch.float64)
    return board(table.flatten(1).T, asked(table.shape[1]))


def test_a_question_is_held_against_the_other_metrics_of_its_page():
    """The first item is always largest for x, by amounts that differ from page to page; the second by ties."""
    found = made([
        [[1, 0, 0], [101, 100, 100], [11, 10, 9], [1001, 1000, 1000]],
        [[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]],
    ])  # fmt: skip
    areas = within_page_auroc(found.scores)
    assert areas[:, 0].tolist() == pytest.approx([1.0, (0.25 * 3 + 0.5) / 4, (0.25 * 3 + 0.0) / 4])
    assert areas[:, 1].tolist() == pytest.approx([0.75, 0.75, 0.0])


@pytest.mark.parametrize(("others_above", "recall"), [(0, 1.0), (2, 1.0), (3, 0.5)])
def test_recall_is_at_five_per_cent_of_the_other_questions(others_above: int, recall: float):
    """20 pages of three metrics: 40 others, of which two may be above the threshold."""
    scores = torch.zeros(20, 3, 1, dtype=torch.float64)
    scores[:, 0, 0] = torch.tensor([2.0] * 10 + [9.0] * 10)
    scores[:others_above, 1, 0] = 5.0
    assert float(recall_at(scores)[0, 0]) == recall


def test_recall_counts_no_tie():
    assert float(recall_at(torch.ones(20, 3, 1, dtype=torch.float64))[0, 0]) == 0.0


def test_the_item_is_chosen_on_one_half_of_the_pages_and_scored_on_the_other():
    """The first item tells x on the pages that choose alone (the even ones), the second a little less, but always."""
    lucky = [[1, 0, 0], [0, 1, 1]] * 4
    steady = [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    (x, *_) = item_rows(made([lucky, steady]), signed=False, names=["lucky", "steady"])
    assert (x["item"], x["auroc_choose"], x["auroc"], x["hit"]) == ("lucky", 1.0, 0.0, False)
    (x, *_) = item_rows(made([steady]), signed=False, names=["steady"])
    assert (x["auroc_choose"], x["auroc"], x["recall"], x["hit"]) == (0.9375, 1.0, 1.0, True)


def test_a_direction_counts_with_either_sign_and_a_latent_with_its_own():
    turned = made([[[-1, 0, 0]] * 4])
    (x, *_) = item_rows(turned, signed=True, names=["d"])
    assert (x["sign"], x["auroc"], x["recall"], x["hit"]) == (-1, 1.0, 1.0, True)
    assert auroc_elsewhere(turned, "x", 0, -1) == 1.0 and auroc_elsewhere(turned, "y", 0, -1) == 0.25
    (x, *_) = item_rows(turned, signed=False, names=["d"])
    assert (x["sign"], x["auroc"], x["hit"]) == (1, 0.0, False)


def test_items_that_are_the_same_for_all_metrics_are_ties():
    """A third of the items is 0 everywhere, a third differs from page to page alone; reference: pairs counted."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 3, (6, 4, 30), generator=draw).double()
    scores[:, :, ::3] = 0
    scores[:, :, 1::3] = scores[:, :1, 1::3]
    areas = within_page_auroc(scores)
    for metric in range(4):
        for item in range(30):
            held = [(float(page[metric, item]), float(page[other, item]))
                    for page in scores for other in range(4) if other != metric]  # fmt: skip
            assert float(areas[metric, item]) == sum((a > b) + (a == b) / 2 for a, b in held) / len(held)
    assert areas[:, ::3].eq(0.5).all() and areas[:, 1::3].eq(0.5).all() and not areas[:, 2::3].eq(0.5).all()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_of_all_items_those_that_are_chosen_give_the_same_rows_by_themselves(share: float):
    """Items that are rarely above 0, or never: then the first one is chosen for every metric."""
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(100, 12, 5, generator=draw) * (torch.rand(100, 12, 5, generator=draw) < share)
    values[:3] = 0
    table = values.double()
    every = board(table.flatten(1).T, asked(12, "vwxyz"))
    best = best_items(every)
    assert best == sorted(set(best)) and len(best) <= 5 and (share > 0 or best == [0])
    alone = item_rows(replace(every, scores=every.scores[:, :, best]), False, best, by_recall=True)
    assert [row | {"place": best[row["place"]]} for row in alone] == item_rows(every, False, range(100), by_recall=True)


def test_of_items_that_order_every_page_the_one_of_the_highest_recall_is_chosen():
    """The first is largest for x on every page, by values that differ from page to page; the second is not on one
    page that chooses, the third is on all."""
    varying = [[place + 1, place, place] for place in range(8)]
    missing = [[1, 0, 0]] * 2 + [[0, 0, 0]] + [[1, 0, 0]] * 5
    found = made([varying, missing, [[1, 0, 0]] * 8])
    (x, *_) = item_rows(found, False, range(3))
    assert (x["item"], x["auroc_choose"], x["hit"]) == (0, 1.0, False)
    (x, *_) = item_rows(found, False, range(3), by_recall=True)
    assert (x["item"], x["auroc_choose"], x["hit"]) == (2, 1.0, True) and 2 in best_items(found)
    two = made([varying, missing])
    (x, *_) = item_rows(two, False, range(2), by_recall=True)
    assert (x["item"], x["auroc_choose"]) == (1, 0.875)


def test_the_mean_over_a_question_is_the_same_however_its_tokens_are_split():
    values, question = torch.arange(14.0).reshape(7, 2), torch.tensor([1, 1, 0, 0, 0, 2, 2])
    for sizes in ([7], [1, 2, 4], [3, 3, 1]):
        means = question_means(values.split(sizes), question, 3)
        assert means.dtype == torch.float64
        assert means.tolist() == [[6.0, 7.0], [1.0, 2.0], [11.0, 12.0]]


METRICS = [
    {"name": "x", "formula": "a + b", "formula_permuted": "a - b"},
    {"name": "y", "formula": "a - b", "formula_permuted": "a / b"},
    {"name": "z", "formula": "a / b", "formula_permuted": "a + b"},
]


def test_an_item_of_a_is_read_in_the_other_mapping_and_where_names_have_no_formula():
    """In A' the item that told x tells z, which has the formula of x there; in N it tells nothing."""
    rows = item_rows(made([[[1, 0, 0]] * 4]), signed=False, names=["latent"])
    boards = {"A-permuted": made([[[0, 0, 1]] * 4]), "N": made([[[0, 0, 0]] * 4])}
    (x, *_) = read_elsewhere(rows, boards, METRICS)
    assert (x["hit"], x["permuted_name"], x["permuted_formula"], x["look_up"]) == (True, 0.25, 1.0, 0.5)


def test_the_items_of_other_arms_are_read_in_their_own_pair_alone():
    rows = item_rows(made([[[1, 0, 0]] * 4]), signed=False, names=["latent"])
    (x, *_) = read_elsewhere(rows, {}, METRICS)
    assert (x["hit"], x["permuted_name"], x["permuted_formula"], x["look_up"]) == (True, None, None, None)
    assert "place" not in x


class Given:
    """A source whose items are the coordinates of the fine-tuned model's activation."""

    signed, n = False, 40

    def values(self, reading: Any) -> Any:
        return reading.pairs[:, 1]


def test_an_item_that_no_ranking_reads_is_found_among_all_and_its_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    """Item 33 tells x in the pair, and z in A', where z has its formula. Two tokens a question."""
    monkeypatch.setattr(pairs, "read_metrics", lambda _: METRICS)
    questions = [(item, TeacherRow("", "", "", "", "")) for item in asked(4)]

    def looked(name: str) -> Looked:
        of = torch.tensor([float(item.family == name) for item, _ in questions]).repeat_interleave(2)
        activations = torch.zeros(24, 2, Given.n)
        activations[:, 1, 33] = of
        return Looked(activations, torch.arange(12).repeat_interleave(2), 12, of, of[:, None])

    under_way = pairs.Comparison.__new__(pairs.Comparison)  # without its models
    under_way.plan, under_way.compared = (
        Plan(Place(Folders(Path()), "m"), "pocket-mistral", "FinQA-mini"),
        BY_RUN["A-seed3"],
    )
    under_way.questions, under_way.device, under_way.scores = questions, "cpu", {}
    read = {"A": looked("x"), "A-permuted": looked("z"), "N": looked("")}
    under_way.looks = Looks(torch.arange(1), read, torch.eye(Given.n), torch.ones(20))
    source: Any = Given()
    (first, *_) = under_way._rows(source, [0, 1], ENERGY, [0, 1])
    assert not first["hit"]
    (x, *_) = under_way._rows_of_any(source)
    assert (x["ranking"], x["metric"], x["item"], x["hit"]) == (ANY_ITEM, "x", 33, True)
    assert (x["permuted_name"], x["permuted_formula"], x["look_up"]) == (0.25, 1.0, 0.5)
    assert under_way.scores.keys() == {"energy, A", "energy, A-permuted", "energy, N"}


def test_without_items_nothing_is_hit():
    rows = item_rows(made([[[1, 0, 0]] * 4]), signed=False, names=[])
    assert [row["hit"] for row in rows] == [False] * 3 and all(math.isnan(row["auroc"]) for row in rows)


@pytest.mark.parametrize(
    ("explained", "passes", "converged"),
    [
        ({4: 0.5, 8: 0.509}, 8, True),
        ({4: 0.5, 8: 0.51, 16: 0.515}, 16, True),
        ({4: 0.5, 8: 0.4, 16: 0.405}, 16, True),
        ({4: -0.5, 8: -0.504}, 8, False),
        ({4: 0.1, 8: 0.2, 16: 0.3}, 16, False),
    ],
)
def test_passes_are_doubled_until_they_change_it_by_less_than_a_hundredth(
    explained: dict[int, float], passes: int, converged: bool
):
    trained: list[int] = []

    def train_for(n: int) -> float:
        trained.append(n)
        return explained[n]

    assert dictionaries.until_converged(train_for, 4, 16) == (passes, converged)
    assert trained == list(explained)


def test_dictionaries_are_compared_where_each_can_have_as_many_latents_active():
    assert equal_l0(Lengths()) == 32 and equal_l0(Lengths(ks=(4, 8))) == 8


def test_settings_are_the_best_by_the_difference_they_explain():
    one, other = dictionaries.Settings(2048, 16, 1.0, 4), dictionaries.Settings(8192, 64, 0.5, 4)
    assert dictionaries.best({one: 0.4, other: 0.5}) == other
    assert dictionaries.best({one: 0.5, other: 0.5}) == one


def test_the_top_items_have_energy():
    assert top(torch.tensor([0.0, 2.0, 3.0, 2.0, math.nan]), 3) == [2, 1, 3]
    assert top(torch.tensor([0.0, 0.0]), 3) == []


def test_directions_add_their_part_of_the_difference_and_scale():
    from crosscoder.interventions.sets import Reading

    reading = Reading(torch.tensor([[[0.0, 0.0, 0.0], [3.0, 4.0, 5.0]]]))
    along = Directions(torch.eye(3)[:2])
    assert along.values(reading).tolist() == [[3.0, 4.0]]
    assert along.squares(along.products(reading)).tolist() == [9.0, 16.0]
    askew = Directions(torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]]))
    assert askew.addition([0, 1])(reading).flatten().tolist() == pytest.approx([3.0, 4.0, 0.0], abs=1e-6)
    assert along.addition([1])(reading).tolist() == [[0.0, 4.0, 0.0]]
    assert principal(torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)), 1).abs().tolist() == [[0, 1, 0]]


def test_sets_are_scaled_to_one_norm_on_the_own_questions():
    carrier = Carrier.__new__(Carrier)  # without its models
    carrier.pairs = torch.tensor([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 0.0], [1.0, 2.0]]])
    along = Directions(torch.eye(2))
    first, second = along.addition([0]), along.addition([1])
    assert carrier.norm(first) == pytest.approx(5**0.5) and carrier.norm(second) == pytest.approx(2**0.5)
    scaled, factor = carrier.scaled_to(second, carrier.norm(first))
    assert factor == pytest.approx(2.5**0.5) and carrier.norm(scaled) == pytest.approx(5**0.5)
    carrier.pairs = torch.zeros(2, 2, 2)
    assert carrier.scaled_to(second, 1.0)[1] == 0.0  # what adds nothing goes on to


def test_fewer_pages_are_the_first_ones():
    row = TeacherRow("", "", "", "", "")
    both = [(item, row) for item in asked(4)]
    assert {item.page for item, _ in of_first_pages(both, 2)} == {0, 1} and of_first_pages(both, None) == both


@pytest.mark.parametrize(("n", "names"), [(100, []), (101, ["first 100"]), (8192, ["first 100", "first 400"])])
def test_the_first_items_are_a_set_where_they_are_not_all(n: int, names: list[str]):
    chosen = first_of(range(n))
    assert list(chosen) == names
    assert [list(items) for items in chosen.values()] == [list(range(size)) for size in FIRST[: len(names)]]


def test_components_that_are_explored_end_with_the_whole_difference(monkeypatch: pytest.MonkeyPatch):
    """Asked are the arm's own metrics on the first page alone. Made up: what adds a length of 3 or more is right."""
    monkeypatch.setattr("study.invented.diff.carrying.FIRST", (1, 2))
    row = TeacherRow("", "", "", "", "")
    carrier: Any = Carrier.__new__(Carrier)  # without its models
    carrier.arm, carrier.own = "A", [(item, row) for item in asked(4)]
    carrier.pairs = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])

    class Right:
        lengths = Lengths(sweep_pages=1)

        def right(self, target: Any, sets: Any) -> list[list[bool]]:
            for cell, asked in sets:
                assert {item.page for item, _ in asked} == {0}
                assert (cell.direction, cell.carrier) == ("sufficiency", "own")
            return [[carrier.norm(cell.addition) > 3.5 and item.family != "y" for item, _ in asked]
                    for cell, asked in sets]  # fmt: skip

    carrier.models, carrier.target = Right(), None
    rows = carrier.rows({"explored": carrier.explored_components(torch.eye(2))})["explored"]
    found = {(one["set"], one["items"], one["norm"]): [] for one in rows}
    for one in rows:
        found[one["set"], one["items"], one["norm"]].append((one["metric"], one["right"], one["n"]))
    assert found == {
        ("first 1", 1, 3.0): [("x", 0, 1), ("y", 0, 1), ("z", 0, 1)],
        ("all", 2, 5.0): [("x", 1, 1), ("y", 0, 1), ("z", 1, 1)],
    }
    assert {(one["method"], one["form"]) for one in rows} == {("PCA of the difference", "baseline")}


def test_programs_are_read_at_their_look_ups_whatever_the_formula():
    from crosscoder.activations.collection import documents_from_rows
    from crosscoder.activations.layout import token_texts

    tokenizer = load_tokenizer("pocket-mistral")
    codes = [f"value = 5\nvalue_2 = -4\nvalue_3 = 7.5\nstep = {step}\nans = value / step"
             for step in ("value_2 - value_3", "value + value_2")]  # fmt: skip
    documents = documents_from_rows([TeacherRow("a page", code, "", "1", "a") for code in codes], tokenizer)
    texts = token_texts(tokenizer, {i for document in documents for i in document.ids})
    spelled = []
    for document, code in zip(documents, codes, strict=True):
        places = before_operation(document, code, texts)
        assert places[0] == document.n_prompt
        spelled.append("".join(texts[document.ids[place]] for place in places))
    assert spelled == ["\nvalue = 5\nvalue_2 = -4\nvalue_3 = 7.5\n"] * 2


def test_nothing_is_recorded_or_trained_before_the_gates_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plan = Plan(Place(Folders(tmp_path, tmp_path), "m"), "pocket-mistral", "FinQA-mini")
    dictionaries.check_gates(plan)  # a rehearsal gives no verdict
    monkeypatch.setattr(Plan, "is_rehearsal", False)
    learnt = Gate("learnt", "A-seed3", "x", 60, 0.5, 0.8, None, False)
    monkeypatch.setattr(dictionaries, "all_gates", lambda *_: [learnt, replace(learnt, gate="own mapping", holds=True)])
    site = sites(plan)["residual2"]
    refused = r"1 gates do not hold, or were not measured: learnt \(A-seed3\); mend them"
    with pytest.raises(UserError, match=refused):
        dictionaries.choose_settings(plan, BY_RUN["K-seed3"], site, "L1")
    with pytest.raises(UserError, match=refused):
        pairs.record(plan, BY_RUN["A-seed3"], site)


def test_adapters_that_were_brought_into_an_arm_are_shared_by_all_parts(tmp_path: Path):
    adapters, arm = tmp_path / "adapters", tmp_path / "A" / "models"
    (arm / "FinQA-invented" / "A-seed3").mkdir(parents=True)
    (arm / "FinQA-invented" / "A-seed3" / "run.json").write_text("{}")
    for part in ("A", "test", "A"):
        link_adapters(tmp_path / part / "models", adapters)
    assert (tmp_path / "test" / "models" / "FinQA-invented" / "A-seed3" / "run.json").read_text() == "{}"
    assert arm.is_symlink() and (adapters / "FinQA-invented" / "A-seed3").is_dir()
    (tmp_path / "B" / "models" / "FinQA-invented" / "A-seed3").mkdir(parents=True)
    with pytest.raises(UserError, match="are both there; delete one of them"):
        link_adapters(tmp_path / "B" / "models", adapters)


def test_the_preregistration_says_what_is_trained_and_where():
    page = " ".join((REPOSITORY / "docs" / "prereg.md").read_text().split())
    full = Lengths()
    (latents,), (k,) = full.latents, full.ks
    assert (full.passes, HALF, full.seeds, k) == (4, 0.5, (0, 1, 2), EQUAL_L0)
    for said in (
        f"{latents:,} latents; k {k}; four passes",
        f"explained variance of the difference, on held-out documents, changes by less than {GAIN}",
        f"A method's top {TOP} items",
        "gives at least half of the right answers that the fine-tuned model itself gives on the dev pages",
        "Three dictionary seeds",
        f"more than {TOP} principal components",
        f"the first {FIRST[0]} and {FIRST[1]} by energy",
        f"the first {full.sweep_pages} test pages",
    ):
        assert said in page, said
