"""The study's plan, its rule for the site, its steps, and when a model is taken as made."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from crosscoder.activations.readers import Target
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders
from finqa.task.records import TeacherRow, write_teacher_rows
from study import work
from study.pocket import causes, dictionaries, measures, models
from study.pocket.ceilings import choose_site, published_target
from study.pocket.pairs import activations, choice_of
from study.pocket.plan import BASE, FINE_TUNED, FULL, OTHER, QUICK, SECOND_SEED, SHAM, Pair, Plan
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


def test_the_full_study_has_every_pair_of_the_design_and_the_seeds_that_it_asks_for():
    seeds = {pair.name: pair.seeds for pair in FULL.pairs}
    assert seeds["base -> fine-tuned"] == seeds["base -> fine-tuned, second seed"] == (0, 1, 2)
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
    assert {d.seed for d in beside} == {0}
    assert not [d for d in dictionaries.dictionaries(FULL, published_target()) if d.target != published_target()]


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
    if pair.seeds[0] < 0:
        raise UserError("a seed below 0")
    return {"seconds": 0.0, "twice": 2 * pair.seeds[0]}


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_side_by_side_or_one_after_the_other_with_one_line_each(rehearsal, capsys, monkeypatch, workers):
    monkeypatch.setattr(work, "n_workers", lambda: workers)
    over = [Pair(BASE, model, seeds=(seed,)) for seed, model in enumerate((FINE_TUNED, SHAM, OTHER))]
    in_parallel(rehearsal, "double", doubled, over, lambda found: f"makes {found['twice']}")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.rpartition("makes ")[2] for line in lines) == ["0", "2", "4"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_that_fails_ends_the_others_and_says_why(rehearsal, monkeypatch, workers):
    monkeypatch.setattr(work, "n_workers", lambda: workers)
    with pytest.raises(UserError, match="below 0"):
        in_parallel(rehearsal, "double", doubled, [Pair(BASE, SHAM, seeds=(-1,)), Pair(BASE, OTHER)], str)


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


def test_the_causal_reports_hold_a_crosscoder_against_the_difference_sae_and_the_sham(rehearsal: Work):
    target = published_target()
    found = causes.experiments(dictionaries.dictionaries(FULL, target), target)
    assert {(e.dictionary.method, e.replies) for e in found} == {
        (method, replies) for method in ("plain", "difference SAE") for replies in (False, True)
    }
    rivals = {(d.pair.name, d.method) for d in found[0].rivals}
    assert rivals == {("base -> fine-tuned", "difference SAE"), ("base -> sham", "plain")}


def test_every_setting_of_the_plan_is_in_its_record():
    assert asdict(FULL)["pairs"][0]["seeds"] == (0, 1, 2)
