"""Latent scaling against least squares, one latent and one number at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import (
    CONDITIONS,
    LatentScaling,
    exclusive_counts,
    latent_scaling,
    meet_lines,
    verdict,
)
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.runtime.errors import UserError

D, F, N = 6, 9, 400
SCALES = (1.7, 0.6)


def crosscoder(threshold: float, means: bool = False) -> BatchTopKCrosscoder:
    """A float64 crosscoder with a bias, of which latent 4 is dead."""
    model = BatchTopKCrosscoder(CrosscoderConfig(D, F, 3)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    model.b_enc.data[4] = -1e6
    model.threshold = threshold
    model.activation_scales = SCALES
    model.activation_means = torch.randn(2, D, generator=generator, dtype=torch.float64) if means else None
    return model


def raw_activations() -> Tensor:
    return 0.4 + torch.randn(N, 2, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slope(target: Tensor, regressor: Tensor) -> float:
    """Least squares over all numbers of two [n, d] tensors, by the solver and without an intercept."""
    solution = torch.linalg.lstsq(regressor.reshape(-1, 1), target.reshape(-1, 1)).solution
    return solution.item()


def reference(model: BatchTopKCrosscoder, raw: Tensor, j: int, probe: int, m: int) -> tuple[float, float]:
    """beta_err and beta_rec of latent j in raw space, by the definition."""
    c = model.activation_scales
    means = torch.zeros(2, D) if model.activation_means is None else model.activation_means
    scaled = (raw - means) * torch.tensor(c, dtype=torch.float64)[:, None]
    value = torch.relu(sum(scaled[:, a] @ model.W_enc[a] for a in range(2)) + model.b_enc)
    score = value * (model.W_dec[:, 0].norm(dim=-1) + model.W_dec[:, 1].norm(dim=-1))
    f = torch.where(score > model.threshold, value, 0).detach()
    xhat = ((f @ model.W_dec[:, m] + model.b_dec[m]) / c[m] + means[m]).detach()
    own = f[:, j, None] * model.W_dec[j, m].detach() / c[m]
    regressor = f[:, j, None] * model.W_dec[j, probe].detach() / c[probe]
    return slope(raw[:, m] - (xhat - own), regressor), slope(xhat, regressor)


@pytest.mark.parametrize("means", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("threshold", [0.0, 20.0], ids=["dense", "sparse"])
def test_one_pass_gives_the_least_squares_slopes_of_every_latent(threshold, means):
    model, raw = crosscoder(threshold, means), raw_activations()
    scaling = latent_scaling(model, raw.split(77))
    active = [j for j in range(F) if scaling.n[j]]
    assert 4 not in active
    assert len(active) >= 6
    for j in active:
        for probe in range(2):
            for m in range(2):
                expected = reference(model, raw, j, probe, m)
                assert scaling.beta_err[j, probe, m].item() == pytest.approx(expected[0], rel=1e-11, abs=1e-12)
                assert scaling.beta_rec[j, probe, m].item() == pytest.approx(expected[1], rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("batch_size", [N, 50, 49, 24, 1])
def test_the_slopes_are_the_same_in_any_number_of_batches(batch_size):
    """1, 8, 9, 17 and 400: sums are added up after every eighth and after the last."""
    model, raw = crosscoder(5.0), raw_activations()
    whole, parts = latent_scaling(model, [raw]), latent_scaling(model, raw.split(batch_size))
    assert torch.equal(whole.n, parts.n)
    torch.testing.assert_close(parts.beta_err, whole.beta_err, rtol=1e-10, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(parts.beta_rec, whole.beta_rec, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_nu_in_raw_space_is_nu_in_scaled_space_times_the_ratio_of_scales():
    model, raw = crosscoder(5.0), raw_activations()
    scaling = latent_scaling(model, [raw])
    x = model.scale(raw)
    f = model.encode(x).detach()
    error = (x - model.decode(f)).detach()
    j = int(scaling.n.argmax())
    for probe in range(2):
        regressor = f[:, j, None] * model.W_dec[j, probe].detach()
        beta = [slope(error[:, m] + f[:, j, None] * model.W_dec[j, m].detach(), regressor) for m in range(2)]
        other = 1 - probe
        expected = beta[other] / beta[probe] * SCALES[probe] / SCALES[other]
        assert scaling.nu_err[j, probe].item() == pytest.approx(expected, rel=1e-10)


def test_the_ratio_is_turned_round_for_the_instruct_models_probe():
    beta = torch.tensor([[[2.0, 1.0], [3.0, 4.0]]])
    scaling = LatentScaling(torch.tensor([100]), beta, 2 * beta)
    assert scaling.nu_err.tolist() == [[0.5, 0.75]]
    assert scaling.nu_rec.tolist() == [[0.5, 0.75]]


def test_a_dead_latent_has_no_slope_and_is_never_confirmed():
    scaling = latent_scaling(crosscoder(0.0), [raw_activations()])
    assert scaling.n[4] == 0
    assert torch.isnan(scaling.beta_err[4]).all()
    assert torch.isnan(scaling.beta_rec[4]).all()
    assert scaling.failures(4, own=1) == list(CONDITIONS)
    assert verdict(scaling, 4, own=1) == "unreliable"


def test_single_precision_agrees_with_double():
    raw = raw_activations()
    exact = latent_scaling(crosscoder(0.0), [raw])
    rounded = latent_scaling(crosscoder(0.0).float(), [raw.float()])
    alive = exact.n > 0
    assert torch.allclose(exact.beta_err[alive], rounded.beta_err[alive], rtol=1e-3, atol=1e-4)


def case(n=100, beta=1.0, nu_err=0.1, nu_rec=0.3) -> LatentScaling:
    """One latent, as seen by the fine-tuned model's probe."""
    err = torch.tensor([[[1.0, 1.0], [nu_err * beta, beta]]], dtype=torch.float64)
    rec = torch.tensor([[[1.0, 1.0], [nu_rec * abs(beta), abs(beta)]]], dtype=torch.float64)
    return LatentScaling(torch.tensor([n]), err, rec)


@pytest.mark.parametrize(
    ("of", "failed", "said"),
    [
        ({}, [], "confirmed"),
        ({"nu_err": 0.9}, ["nu_err"], "complete shrinkage"),
        ({"nu_rec": 0.8}, ["nu_rec"], "latent decoupling"),
        ({"nu_err": 0.9, "nu_rec": 0.8}, ["nu_err", "nu_rec"], "complete shrinkage and latent decoupling"),
        ({"n": 49}, ["n"], "unreliable"),
        ({"n": 50}, [], "confirmed"),
        ({"nu_err": -0.5}, ["nu_range"], "unreliable"),
        ({"nu_err": -0.05}, [], "confirmed"),
        ({"nu_rec": 2.5}, ["nu_range", "nu_rec"], "unreliable"),
        ({"beta": -1.0, "nu_err": 0.1}, ["beta"], "unreliable"),
        ({"nu_err": math.nan}, ["nu_range", "nu_err"], "unreliable"),
    ],
)
def test_a_fine_tuned_only_latent_must_meet_every_condition(of, failed, said):
    scaling = case(**of)
    assert scaling.failures(0, own=1) == failed
    assert verdict(scaling, 0, own=1) == said
    assert bool(scaling.exclusive[0, 1]) == (said == "confirmed")


def together(*parts: LatentScaling) -> LatentScaling:
    return LatentScaling(*(torch.cat([getattr(p, name) for p in parts]) for name in ("n", "beta_err", "beta_rec")))


def turned(of: LatentScaling) -> LatentScaling:
    """The two models in each other's place."""
    return LatentScaling(of.n, of.beta_err.flip(1, 2), of.beta_rec.flip(1, 2))


def test_counts_say_how_many_fail_each_condition_and_who_else_meets_them():
    scaling = together(case(), case(nu_err=0.9), case(n=3, nu_err=0.9), case(), turned(case()), case())
    kinds: list[analysis.LatentClass] = ["fine-tuned-only"] * 3 + ["shared", "between", "between"]
    counts = exclusive_counts(scaling, kinds, torch.tensor([True] * 5 + [False]))
    found = counts["fine-tuned-only"]
    assert (found.by_delta, found.confirmed) == (3, 1)
    assert found.fail == {"n": 1, "beta": 0, "nu_range": 0, "nu_err": 2, "nu_rec": 0}
    assert found.meet == {"fine-tuned-only": [0], "between": [], "shared": [3], "instruct-only": []}
    assert (counts["instruct-only"].by_delta, counts["instruct-only"].confirmed) == (0, 0)
    assert counts["instruct-only"].meet == {"instruct-only": [], "between": [4], "shared": [], "fine-tuned-only": []}
    assert meet_lines(counts) == [
        "1 latent meets latent scaling's conditions for instruct-only: "
        "0 instruct-only, 1 between, 0 shared, 0 fine-tuned-only",
        "2 latents meet latent scaling's conditions for fine-tuned-only: "
        "1 fine-tuned-only, 0 between, 1 shared, 0 instruct-only",
    ]


def test_a_latent_is_shown_by_the_vector_of_the_model_that_it_is_confirmed_for():
    both = together(case(), turned(case()), case(nu_err=0.9), case(nu_err=0.9))
    kinds: list[analysis.LatentClass] = ["instruct-only", "between", "between", "instruct-only"]
    assert both.probes(kinds).tolist() == [1, 0, 1, 0]


def test_a_between_latent_whose_direction_the_other_model_lacks_is_confirmed():
    """The instruct model has the latent in another direction, half as long: Delta 0.75, and nothing along D."""
    model = BatchTopKCrosscoder(CrosscoderConfig(D, 2, 1)).double()
    directions = torch.eye(D, dtype=torch.float64)
    model.W_dec.data = torch.stack([0.5 * directions[:2], directions[2:4]], dim=1)
    model.W_enc.data = torch.stack([torch.zeros(D, 2), directions[2:4].T])
    model.b_enc.data.zero_()
    model.b_dec.data.zero_()
    model.threshold = 0.0
    values = torch.rand(N, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    scaling = latent_scaling(model, [torch.einsum("nf,fmd->nmd", values, model.W_dec.data)])
    kinds = analysis.classify(analysis.delta(analysis.decoder_norms(model)))
    assert kinds == ["between", "between"]
    counts = exclusive_counts(scaling, kinds, torch.tensor([True, True]))
    assert counts["fine-tuned-only"].meet["between"] == [0, 1]
    # Nor does the fine-tuned model have the other direction.
    assert counts["instruct-only"].meet["between"] == [0, 1]


@pytest.mark.parametrize("method", ["difference-sae", "stagewise-sae"])
def test_a_dictionary_without_one_value_for_two_models_has_nothing_to_scale(method):
    model = new_dictionary(CrosscoderConfig(D, F, 2, method=method))
    with pytest.raises(UserError, match=f"a {method} has no such latents"):
        latent_scaling(model, [])
