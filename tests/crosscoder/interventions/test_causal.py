"""Patches by sets of latents, where the right answer is known."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from patched_models import (
    SITE,
    asked_about,
    documents_written_by,
    planted_crosscoder,
    planted_pair,
    planted_sae,
)

from crosscoder.activations.readers import Target
from crosscoder.interventions.causal import Cell, measure
from crosscoder.interventions.causal_report import CausalConfig, causal_report
from crosscoder.interventions.causal_rows import low_ceilings
from crosscoder.interventions.halves import pair_of
from crosscoder.interventions.patching import batch_of, run_halves
from crosscoder.interventions.ranking import by_effect, reading_of, survey
from crosscoder.interventions.sets import Components, Constant, Latents, Nothing, RandomDirections, Whole, matched_set
from finqa.runtime.errors import UserError
from finqa.runtime.journal import KeyedJournal

SMALL = CausalConfig(n_random=3, carriers=("own", "other"))


@pytest.fixture(scope="module")
def planted():
    instruct, fine_tuned, direction = planted_pair()
    return pair_of(instruct, fine_tuned), direction


@pytest.fixture(scope="module")
def documents(planted):
    return documents_written_by(planted[0].fine_tuned.model, 12)


@pytest.fixture(scope="module")
def others(planted):
    """To rank latents on."""
    return documents_written_by(planted[0].fine_tuned.model, 8, first=20)


@pytest.fixture(scope="module")
def report(planted, documents, others, tmp_path_factory):
    pair, direction = planted
    folder = tmp_path_factory.mktemp("causal")
    return causal_report(planted_crosscoder(direction), pair, asked_about(documents), others, SITE, folder, SMALL)


def shares(report, kind, measure="divergence", group="all", **where):
    """[(latents, recovered)] of the rows of a kind."""
    wanted = {"kind": kind, "measure": measure, "group": group, **where}
    return [(r["n_latents"], r["recovered"]) for r in report["rows"] if wanted.items() <= r.items()]


def an_adapter(fine_tuned):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return pair_of(get_peft_model(fine_tuned, settings).eval())


@pytest.mark.parametrize("attention", ["sdpa", "eager", "sliding"])
@pytest.mark.parametrize(
    ("layer", "site"), [(1, "residual"), (2, "mlp"), (2, "attention"), (3, "mlp"), (3, "residual")]
)
def test_every_cell_gives_what_whole_models_with_hooks_give(documents, layer, site, attention):
    """Within 1e-5 nats, and the same verdicts: a document and a patch at a time, logits at every token."""
    from benchmarks.parts.plain_patches import plain_patch

    instruct, fine_tuned, direction = planted_pair()
    dictionary, target = planted_crosscoder(direction), Target(layer, site)
    dictionary.W_dec[1:, 1] *= 1.5
    for model in (instruct, fine_tuned):
        model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        model.config.sliding_window = 8 if attention == "sliding" else None
    for pair in (pair_of(instruct, fine_tuned), an_adapter(copy.deepcopy(instruct))):
        additions = [Nothing(), Whole(), Latents(dictionary, [0, 2]), RandomDirections(dictionary, [1, 3], 0)]
        cells = [Cell(a, d, c) for a in additions for d in ("sufficiency", "necessity") for c in ("own", "other")]
        for cell, found in zip(cells, measure(pair, target, documents, cells, batch_tokens=60), strict=True):
            divergence, exact, added = zip(*(plain_patch(pair, target, d, cell) for d in documents), strict=True)
            assert found.divergence == pytest.approx(divergence, abs=1e-5) and found.exact == list(exact)
            length = torch.cat(added).double().square().sum(-1).mean().sqrt()
            assert found.injected == pytest.approx(float(length), rel=1e-5)


def test_the_planted_latent_is_the_whole_difference_at_the_site(planted, documents):
    pair, direction = planted
    halves = run_halves(pair, batch_of(documents), [2])
    reading = reading_of(halves, SITE)
    for dictionary in (planted_crosscoder(direction), planted_sae(direction)):
        torch.testing.assert_close(Latents(dictionary, [0])(reading), reading.difference, rtol=1e-3, atol=1e-4)
    # The others write the same into both models: nothing of them is in the difference.
    assert Latents(planted_crosscoder(direction), [1, 2, 3])(reading).abs().max() < 1e-5
    assert (reading.values(planted_crosscoder(direction))[:, 1:] > 0).any()


def test_the_planted_latent_recovers_all_and_the_empty_set_nothing(report):
    for direction in ("sufficiency", "necessity"):
        place = {"direction": direction, "carrier": "own"}
        assert report["order"][0] == 0
        assert all(share == pytest.approx(1, abs=1e-3) for _, share in shares(report, "ranked", **place))
        assert shares(report, "none", **place) == [(0, 0)]
        assert shares(report, "ceiling", **place) == [(0, 1)]
        assert shares(report, "components", **place)[0][1] == pytest.approx(1, abs=1e-3)
        assert shares(report, "ranked", "exact", **place)[0][1] == pytest.approx(1)
        assert all(abs(share) < 1e-3 for _, share in shares(report, "worst", **place) if share is not None)


def test_the_planted_latent_of_a_difference_sae_recovers_all_too(planted, documents, others, tmp_path):
    pair, direction = planted
    config = CausalConfig(n_random=0, carriers=("own",))
    report = causal_report(planted_sae(direction), pair, asked_about(documents), others, SITE, tmp_path, config)
    assert all(share == pytest.approx(1, abs=1e-3) for _, share in shares(report, "ranked"))


def test_the_layers_above_are_alike_so_either_carrier_gives_the_same(report):
    own, other = ([r["value"] for r in report["rows"] if r["carrier"] == c] for c in ("own", "other"))
    assert own == pytest.approx(other, abs=1e-9) and len(own) > 20


def test_every_group_of_questions_has_its_share(report, documents):
    groups = {row["group"]: row["n"] for row in report["rows"]}
    assert groups == {"all": 12, "known": 6, "new": 6, "difference": 6, "ratio": 6}
    right = next(r for r in report["rows"] if r["kind"] == "ranked" and r["measure"] == "exact" and r["group"] == "all")
    # All that the site can make right, which is less than all: BOS differs above the site and is not patched.
    assert right["none"] < 0.1 < right["value"] == right["ceiling"] < 1 and right["mcnemar_p"] < 0.01


def test_random_sets_and_directions_are_the_null(report):
    place = {"direction": "sufficiency", "carrier": "own"}
    directions = shares(report, "random directions", **place)
    assert len(directions) >= 3 and max(share for _, share in directions) < 0.5
    assert len(shares(report, "random sets", **place)) >= 3
    assert all(abs(share) < 1e-3 for _, share in shares(report, "random sets", **place))
    wanted = {"n_latents": 1, "group": "all", "measure": "divergence", "direction": "sufficiency"}
    among = [r for r in report["random"] if wanted.items() <= r.items()]
    assert sorted(r["control"] for r in among) == ["random directions"] * 2 + ["random sets"] * 2  # two carriers
    assert all(r["p"] == 1 / 4 and r["n_sets"] == 3 for r in among)
    # Taking anything away harms the fine-tuned model, so there random directions open a gap of their own.
    harmed = [share for _, share in shares(report, "random directions", direction="necessity", carrier="own")]
    assert min(harmed) > 0.1


def test_identical_models_have_no_gap_and_the_report_says_so(planted, documents, others, tmp_path):
    pair, direction = planted
    same = pair_of(pair.instruct.model, copy.deepcopy(pair.instruct.model))
    config = CausalConfig(n_random=1, directions=("sufficiency",), carriers=("own",))
    dictionary = planted_crosscoder(direction)
    dictionary.W_dec[1:, 1] *= 1.2  # so that there is something to add
    found = causal_report(dictionary, same, asked_about(documents), others, SITE, tmp_path, config)
    assert all(row["recovered"] is None and row["interval"] is None for row in found["rows"])
    assert any("nothing to recover" in note for note in found["notes"])
    assert any(row["value"] > 0 for row in found["rows"] if row["kind"] == "ranked")
    assert "NaN" not in (tmp_path / "causal.json").read_text()


def test_a_site_that_closes_little_of_the_gap_is_named(report):
    assert not any("closes" in note for note in report["notes"])  # the planted site closes nearly all
    rows = [
        {"kind": kind, "measure": measure, "direction": direction, "carrier": "own", "positions": "all", "group": "new",
         "none": 2.0, "ceiling": ceiling}
        for kind, measure, direction, ceiling in (
            ("ceiling", "divergence", "sufficiency", 1.7),
            ("ceiling", "divergence", "sufficiency", 1.5),
            ("ceiling", "divergence", "necessity", 1.7),
            ("ceiling", "exact", "sufficiency", 1.7),
            ("ranked", "divergence", "sufficiency", 1.7),
        )
    ]  # fmt: skip
    (note,) = low_ceilings(rows)
    assert note.startswith("new, sufficiency, own, all: the whole site closes 15% of the KL, under 20%")


def test_random_directions_are_as_long_as_the_set_at_every_token(planted, documents):
    pair, direction = planted
    reading = reading_of(run_halves(pair, batch_of(documents), [2]), SITE)
    dictionary = planted_crosscoder(direction)
    dictionary.W_dec[1:, 1] *= 1.5
    true, one, again, two = (
        made(reading)
        for made in (
            Latents(dictionary, range(6)),
            *(RandomDirections(dictionary, range(6), seed) for seed in (1, 1, 2)),
        )
    )
    torch.testing.assert_close(one.norm(dim=-1), true.norm(dim=-1))
    assert torch.equal(one, again) and not torch.allclose(one, two)
    assert torch.cosine_similarity(one, true, dim=-1).abs().mean() < 0.5


def test_matched_sets_are_alike_and_share_nothing_with_the_set():
    generator = torch.Generator().manual_seed(0)
    frequency = torch.rand(400, generator=generator) ** 3
    injected = torch.rand(400, generator=generator)
    chosen = list(range(20))
    sets = [matched_set(chosen, frequency, injected, range(400), seed) for seed in range(20)]
    assert all(s is not None and len(set(s)) == 20 and set(s).isdisjoint(chosen) for s in sets)
    assert len({tuple(sorted(s or [])) for s in sets}) == 20
    for quantity in (frequency, injected):
        wanted = quantity[:20].log().mean()
        matched = torch.tensor([float(quantity[s].log().mean()) for s in sets]).mean()
        unmatched = quantity[20:].log().mean()
        assert abs(matched - wanted) < 0.4 * abs(unmatched - wanted) + 0.05
    assert matched_set(list(range(300)), frequency, injected, range(400), 0) is None


def test_mean_difference_and_components_are_those_of_the_difference(planted, others):
    pair, direction = planted
    found = survey(planted_crosscoder(direction), pair, others, SITE)
    reading = reading_of(run_halves(pair, batch_of(others), [2]), SITE)
    difference = reading.difference.double()
    assert found.n_tokens == len(difference) == sum(len(d.ids) - 1 for d in others)
    torch.testing.assert_close(found.mean_difference, difference.mean(0), rtol=1e-4, atol=1e-5)
    _, _, axes = torch.linalg.svd(difference, full_matrices=False)
    assert abs(float(axes[0] @ found.components(1)[0])) == pytest.approx(1, abs=1e-6)
    all_of_it = Components(found.components(32).float())(reading)
    torch.testing.assert_close(all_of_it, reading.difference, rtol=1e-3, atol=1e-4)
    assert torch.equal(
        Constant("mean", found.mean_difference)(reading)[0].double(), found.mean_difference.float().double()
    )


def test_the_estimated_effect_is_the_slope_of_the_divergence(planted, others):
    """Against a finite difference: a little of the latent's vector added everywhere."""
    pair, direction = planted
    dictionary = planted_crosscoder(direction)
    dictionary.W_dec[1:, 1] *= 1.5
    found = survey(dictionary, pair, others, SITE)

    class Little(Latents):
        def __call__(self, reading):
            return 1e-3 * super().__call__(reading)

    counts = torch.tensor([len(d.ids) - d.n_prompt for d in others], dtype=torch.float64)
    cells = [Cell(a, "sufficiency", "own") for a in (Nothing(), *(Little(dictionary, [j], "x", j) for j in range(6)))]
    none, *moved = [(torch.tensor(m.divergence) * counts).sum() for m in measure(pair, SITE, others, cells)]
    slopes = torch.stack([(none - m) / 1e-3 for m in moved])
    torch.testing.assert_close(slopes, found.effect, rtol=0.05, atol=0.05 * float(found.effect.abs().max()))
    assert by_effect(found)[0] == int(slopes.argmax()) and found.effect.abs().max() > 1e-2


def test_a_killed_report_goes_on_and_gives_the_same(planted, documents, others, report, tmp_path, monkeypatch):
    from crosscoder.interventions import causal

    pair, direction = planted
    arguments = (planted_crosscoder(direction), pair, asked_about(documents), others, SITE, tmp_path)
    true_measure, calls = causal._measure_batch, []

    def killed(*arguments):
        calls.append(len(arguments[2].ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true_measure(*arguments)

    monkeypatch.setattr(causal, "batch_tokens_for", lambda pair: 40)
    monkeypatch.setattr(causal, "_measure_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        causal_report(*arguments, SMALL)
    journal = tmp_path / "cells.jsonl"
    assert len(journal.read_text().splitlines()) == 2
    journal.write_text(journal.read_text() + '{"key": "half a li')
    again = causal_report(*arguments, SMALL)
    assert sum(calls[:2]) + sum(calls[3:]) == len(documents)
    for ours, whole in zip(again["rows"], report["rows"], strict=True):
        assert ours["value"] == pytest.approx(whole["value"], abs=1e-6)
    calls.clear()
    assert causal_report(*arguments, SMALL)["rows"] == again["rows"] and calls == []
    # Killed while the cells were written down, after the last batch.
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-7]))
    assert causal_report(*arguments, SMALL)["rows"] == again["rows"] and calls == []
    assert json.loads((tmp_path / "causal.json").read_text())["rows"] == again["rows"]


def test_a_cell_of_other_weights_is_another_cell(planted, documents, others, tmp_path):
    pair, direction = planted
    config = CausalConfig(n_random=0, directions=("sufficiency",), carriers=("own",))
    arguments = (asked_about(documents), others, SITE, tmp_path, config)
    causal_report(planted_crosscoder(direction), pair, *arguments)
    lines = len(KeyedJournal(tmp_path / "cells.jsonl").read().found)
    changed = copy.deepcopy(pair.fine_tuned.model)
    with torch.no_grad():
        changed.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    causal_report(planted_crosscoder(direction), pair_of(pair.instruct.model, changed), *arguments)
    assert len(KeyedJournal(tmp_path / "cells.jsonl").read().found) == 2 * lines


def test_latents_are_not_chosen_on_what_they_are_scored_on(planted, documents, tmp_path):
    pair, direction = planted
    dictionary, asked = planted_crosscoder(direction), asked_about(documents)
    with pytest.raises(UserError, match="chosen on documents"):
        causal_report(dictionary, pair, asked, documents[:2], SITE, tmp_path)


def test_every_site_can_be_patched(planted, documents):
    """With the whole difference of the last residual, all is recovered; before the change, nothing is there."""
    pair, _ = planted
    for site in ("attention", "mlp", "residual"):
        for layer, expected in ((1, 0.0), (3, 1.0 if site == "residual" else None)):
            cells = [Cell(a, "sufficiency", "own") for a in (Nothing(), Whole())]
            none, whole = (sum(m.divergence) for m in measure(pair, Target(layer, site), documents, cells))
            if expected is not None:
                assert 1 - whole / none == pytest.approx(expected, abs=1e-6)
