"""The study's plan, its rule for the site, its steps, and when a model is taken as made."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.dictionaries.checkpoint import load_dictionary
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.interventions.causal_rows import Asked
from crosscoder.interventions.sets import Constant, Reading
from crosscoder.training.trainer import Trainer
from finqa.evaluation.generation import Reply
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal
from finqa.runtime.paths import Folders
from finqa.task.records import TeacherRow, write_teacher_rows
from study import work
from study.planted.planted_activations import Kind, plant, planted_store
from study.pocket import causes, dictionaries, measures, models
from study.pocket.ceilings import choose_site, published_target
from study.pocket.pairs import activations, choice_of
from study.pocket.plan import (
    BASE,
    FINE_TUNED,
    FULL,
    METHODS,
    OTHER,
    QUICK,
    SECOND_SEED,
    SHAM,
    THIRD_SEED,
    Pair,
    Plan,
)
from study.work import Work, in_parallel, run, step

RESIDUAL = Target(4, "residual")


@pytest.fixture
def rehearsal(tmp_path: Path) -> Work:
    return Work(QUICK, Folders(tmp_path / "data", tmp_path / "results"), tmp_path / "out")


@pytest.mark.parametrize(
    ("instruct", "fine_tuned", "added"),
    [
        (BASE, FINE_TUNED, ("new",)),
        (SHAM, FINE_TUNED, ("new",)),
        (BASE, SHAM, ()),
        (BASE, OTHER, ("other",)),
        (FINE_TUNED, SECOND_SEED, ()),
        (FINE_TUNED, FINE_TUNED, ()),
    ],
)
def test_what_a_pair_has_to_find_is_what_only_its_second_model_learnt(instruct, fine_tuned, added):
    assert Pair(instruct, fine_tuned).added == added


def test_the_full_study_has_every_pair_of_the_design_and_every_form_for_each_fine_tune():
    repeated = [pair for pair in FULL.pairs if pair.compared == "base -> fine-tuned"]
    assert [pair.fine_tuned for pair in repeated] == [FINE_TUNED, SECOND_SEED, THIRD_SEED]
    assert len({pair.seed for pair in repeated}) == 3
    trained = dictionaries.dictionaries(FULL, RESIDUAL)
    for pair in repeated:
        forms = {(d.method, d.form) for d in trained if d.pair == pair}
        expected = {(method, form) for method in METHODS for form in ("trained", "untrained", "frozen decoder")}
        assert forms == expected - {("difference term", "untrained")}
    pairs = {(pair.instruct, pair.fine_tuned) for pair in FULL.pairs}
    assert {(BASE, SHAM), (SHAM, FINE_TUNED), (BASE, OTHER), (FINE_TUNED, SECOND_SEED)} < pairs
    assert any(pair.identical for pair in FULL.pairs)


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=lambda plan: plan.name)
@pytest.mark.parametrize("target", [published_target(), RESIDUAL])
def test_no_two_trainings_or_measures_share_a_folder(plan: Plan, target: Target):
    trained = dictionaries.dictionaries(plan, target)
    asked = measures.subjects(Work(plan, Folders(), Path("out")), trained, target)
    assert len({one.name for one in asked}) == len(asked)
    assert {d for d in asked if isinstance(d, dictionaries.Dictionary)} == set(trained)
    folders = [activations(Work(plan, Folders(), Path("out")), pair, target) for pair in plan.pairs]
    assert len(set(folders)) == len(folders)


def test_the_published_site_is_read_beside_another_one_for_the_main_pair_alone():
    beside = [d for d in dictionaries.dictionaries(FULL, RESIDUAL) if d.target == published_target()]
    assert {d.pair.name for d in beside} == {"base -> fine-tuned"}
    assert not [d for d in dictionaries.dictionaries(FULL, published_target()) if d.target != published_target()]


def test_the_sham_sees_as_many_distinct_rows_as_the_fine_tune_each_as_often(rehearsal: Work):
    work = replace(rehearsal, plan=FULL)
    rows = {kinds: models._training_questions(work, kinds) for kinds in (FINE_TUNED.kinds, SHAM.kinds)}
    assert FINE_TUNED.families == SHAM.families == "all"
    texts = {kinds: {(str(r["table"]), r["qa"]["question"]) for r in its} for kinds, its in rows.items()}
    assert [len(its) for its in rows.values()] == [5000, 5000]
    assert [len(its) for its in texts.values()] == [5000, 5000]
    assert {r["qa"]["family_kind"] for r in rows[SHAM.kinds]} == {"known"}


def test_every_activation_set_has_the_minimal_pairs(rehearsal: Work):
    questions = models._test_questions(rehearsal)
    assert len(questions) == QUICK.documents == choice_of(rehearsal, QUICK.pairs[0], RESIDUAL).num_samples
    pairs = [record["qa"] for record in questions if "pair" in record["qa"]]
    assert len({qa["pair"] for qa in pairs}) == QUICK.pair_pages
    assert len({(qa["pair"], qa["family"]) for qa in pairs}) == len(pairs)


def test_two_fine_tunes_are_collected_against_each_other_and_the_base_against_nothing(rehearsal: Work):
    assert choice_of(rehearsal, Pair(SHAM, FINE_TUNED), RESIDUAL).against == "sham"
    assert choice_of(rehearsal, Pair(FINE_TUNED, SECOND_SEED), RESIDUAL).against == ""
    assert choice_of(rehearsal, Pair(BASE, SHAM), RESIDUAL).against is None


def ceiling_rows(mlp: dict[int, float], residual: dict[int, float]) -> list[dict[str, Any]]:
    """Sufficiency as given, with larger figures of the other kinds beside it, which must not count."""
    rows = []
    for site, closed in (("mlp", mlp), ("residual", residual)):
        for layer, share in closed.items():
            place = {"layer": layer, "site": site}
            rows.append(place | {"direction": "sufficiency", "carrier": "own", "divergence_closed": share})
            rows.append(place | {"direction": "sufficiency", "carrier": "other", "divergence_closed": 0.99})
            rows.append(place | {"direction": "necessity", "carrier": "own", "divergence_closed": 0.99})
    return rows


@pytest.mark.parametrize(
    ("published", "residual", "target"),
    [
        (0.21, [0.9] * 5, Target(3, "mlp")),
        (0.20, [0.9] * 5, Target(3, "mlp")),
        (0.19, [0.3, 0.5, 0.7, 0.86, 1.0], Target(4, "residual")),
        (0.19, [0.3, 0.8, 0.9, 0.95, 1.0], Target(2, "residual")),
        (0.19, [0.1, 0.2, 0.3, 0.4, 1.0], Target(4, "residual")),
    ],
)
def test_the_site_follows_from_what_it_carries(published, residual, target):
    mlp = {layer: published if layer == 3 else 0.95 for layer in range(1, 6)}
    chosen, why = choose_site(ceiling_rows(mlp, dict(enumerate(residual, 1))))
    assert chosen == target
    assert f"closes {published:.0%}" in why


def test_a_command_that_fails_says_where_and_why(rehearsal: Work):
    with pytest.raises(UserError, match=r"fine-tune sham failed \(exit code 3\)") as failure:
        run(rehearsal, "fine-tune sham", "-c 'print(*range(50), sep=chr(10)); raise SystemExit(3)'")
    assert str(rehearsal.log("fine-tune sham")) in str(failure.value)
    assert str(failure.value).endswith("48\n49\n")


def test_a_step_says_its_main_figure_and_a_failed_one_that_it_is_not_done(capsys):
    with step("count") as say:
        say("3 rows")
    with pytest.raises(UserError), step("bad"):
        raise UserError("no")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("count ") and first.endswith("s  3 rows")
    assert second.endswith("not done")


def doubled(_work: Work, pair: Pair) -> dict[str, Any]:
    """A job of another process: it is found by its name."""
    if pair.seed < 0:
        raise UserError("a seed below 0")
    return {"seconds": 0.0, "twice": 2 * pair.seed}


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_side_by_side_or_one_after_the_other_with_one_line_each(rehearsal, capsys, monkeypatch, workers):
    monkeypatch.setattr(work, "n_workers", lambda: workers)
    over = [Pair(BASE, model, seed=seed) for seed, model in enumerate((FINE_TUNED, SHAM, OTHER))]
    in_parallel(rehearsal, "double", doubled, over, lambda found: f"makes {found['twice']}")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.rpartition("makes ")[2] for line in lines) == ["0", "2", "4"]


def whose(_work: Work, _pair: Pair) -> dict[str, Any]:
    return {"seconds": 0.0, "pid": os.getpid()}


def test_the_processes_of_one_step_are_there_for_the_next(rehearsal, monkeypatch):
    monkeypatch.setattr(work, "n_workers", lambda: 2)

    def processes() -> set[int]:
        seen: set[int] = set()
        in_parallel(rehearsal, "whose", whose, [Pair(BASE, SHAM), Pair(BASE, OTHER)], lambda f: f"{seen.add(f['pid'])}")
        return seen

    # A step is over in a moment, so that one of the two may do all of it: new processes would be three by the third.
    used = processes() | processes() | processes()
    assert os.getpid() not in used and len(used) <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_ends_the_others_and_says_why(rehearsal, monkeypatch, workers):
    monkeypatch.setattr(work, "n_workers", lambda: workers)
    with pytest.raises(UserError, match="below 0"):
        in_parallel(rehearsal, "double", doubled, [Pair(BASE, SHAM, seed=-1), Pair(BASE, OTHER)], str)


@pytest.fixture
def trained(rehearsal: Work) -> Path:
    """What a finished fine-tune of the rehearsal's rows leaves in the data folder that the user gave."""
    rows = [TeacherRow(f"prompt {i}", f"ans = {i}", str(i), str(i), family_kind="known") for i in range(120)]
    write_teacher_rows(rehearsal.folders.filtered("FinQA-mini", "train"), rows)
    folder = rehearsal.given.model("FinQA-mini", models.student_of(FINE_TUNED).model_id)
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.json"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-3").mkdir()
    identity = models._identity(rehearsal, FINE_TUNED)
    (folder / "training_config.json").write_text(json.dumps({**identity, "what came later": 1}))
    return folder


def test_a_fine_tune_that_is_there_is_taken_without_its_checkpoints(rehearsal: Work, trained: Path):
    only = replace(QUICK, pairs=(Pair(BASE, FINE_TUNED),))
    models.make_models(replace(rehearsal, plan=only))
    taken = models.adapter(rehearsal, FINE_TUNED)
    assert {path.name for path in trained.iterdir()} - {path.name for path in taken.iterdir()} == {"checkpoint-3"}
    assert models.is_made(rehearsal, FINE_TUNED)


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 4), ("learning_rate", 1.0), ("rows_hash", "0"), ("families", "known")]
)
def test_a_fine_tune_of_other_rows_or_settings_is_not_taken(rehearsal: Work, trained: Path, name, value):
    config = json.loads((trained / "training_config.json").read_text())
    (trained / "training_config.json").write_text(json.dumps(config | {name: value}))
    assert not models._holds(trained, models._identity(rehearsal, FINE_TUNED))


def test_replies_are_written_once_for_the_sets_that_ask_for_them(monkeypatch, tmp_path):
    kinds = {"none": 0, "ranked": causes.CONTROL_SIZE, "components": 4, "random sets": causes.CONTROL_SIZE}
    cells = [SimpleNamespace(label={"kind": kind, "n": n, "direction": "sufficiency"}) for kind, n in kinds.items()]
    asked = [Asked(Document("a", (1, 5, 9), 2), expected="42"), Asked(Document("b", (1, 6, 9), 2), expected="43")]
    written: list[str] = []

    def replies(pair, target, cell, prompts, tokenizer, max_new_tokens):
        written.append(cell.label["kind"])
        assert prompts == [[1, 5], [1, 6]]
        return [Reply("\nans = 6 * 7\n###End Python", 2, 9, "stop")] * 2

    monkeypatch.setattr("crosscoder.interventions.patched_generation.patched_replies", replies)
    for _ in range(2):
        with KeyedJournal(tmp_path / "cells.jsonl") as journal:
            found = causes.generated(None, Target(17, "mlp"), asked, cells, journal, "key")
        assert found == {number: {"right": [1, 0], "runs": [1, 1]} for number in (0, 1)}
    assert written == ["none", "ranked"]


def test_the_causal_reports_hold_a_dictionary_against_its_untrained_forms_and_the_sham(rehearsal: Work):
    target = published_target()
    found = causes.experiments(dictionaries.dictionaries(FULL, target), target)
    patched = [(e.dictionary.method, e.dictionary.pair.fine_tuned) for e in found if not e.replies]
    assert len(patched) == len(set(patched)) == 2 * 3
    assert {e.dictionary.pair.fine_tuned for e in found if e.replies} == {FINE_TUNED}
    rivals = {name: (d.pair.name, d.method, d.form) for name, d in found[0].rivals}
    assert rivals == {
        "untrained": ("base -> fine-tuned", "plain", "untrained"),
        "frozen decoder": ("base -> fine-tuned", "plain", "frozen decoder"),
        "sham": ("base -> sham", "plain", "trained"),
    }


def test_a_set_that_is_matched_adds_the_same_times_one_number():
    given = Constant("mean difference", torch.tensor([3.0, 4.0]))
    matched = causes.Matched(given, 0.2, "mean difference, equal norm")
    reading = Reading(torch.zeros(5, 2, 2))
    assert matched(reading).norm(dim=-1).tolist() == pytest.approx([1.0] * 5)
    assert matched.label["kind"] == "mean difference, equal norm"
    assert matched.label != causes.Matched(given, 0.3, "mean difference, equal norm").label


def test_an_untrained_dictionary_is_the_start_of_training_and_a_frozen_decoder_stays_there(tmp_path: Path):
    planted = plant([Kind("shared", 12, (1, 1.3), 0.1)], 4_000, 16, seed=0)
    store = planted_store(planted, tmp_path / "activations")
    for method in ("plain", "partition", "difference SAE"):
        models_of: dict[str, Any] = {}
        for form in ("untrained", "frozen decoder", "trained"):
            one = dictionaries.Dictionary(FULL.pairs[0], Target(3, "mlp"), method, form)
            shape, training = dictionaries.settings(store, one, 5)
            model = new_dictionary(shape, training.decoder_norm, torch.Generator().manual_seed(0))
            start = {name: p.detach().clone() for name, p in model.named_parameters()}
            Trainer(model, store, training, tmp_path / f"{method} {form}").fit()
            moved = {name for name, p in model.named_parameters() if not torch.allclose(p, start[name])}
            models_of[form] = moved - {"b_dec"}
            assert load_dictionary(tmp_path / f"{method} {form}").threshold is not None
        every = {"W_enc", "W_dec", "b_enc"}
        assert models_of == {"untrained": set(), "frozen decoder": every - {"W_dec"}, "trained": every}


def test_every_setting_of_the_plan_is_in_its_record():
    assert asdict(FULL)["pairs"][0]["forms"] == ("trained", "untrained", "frozen decoder")
