"""Latents turned up or taken out: against hooks written by hand, on dictionaries of every method."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pytest
import torch
from patched_models import SCALES, SITE, WIDTH
from small_pair import small_pair
from torch import Tensor

from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions.halves import Pair, pair_of
from crosscoder.interventions.steering import active_means, check_steering, half_vectors, steered
from finqa.evaluation.engines.serving import MODELS, Model
from finqa.runtime.errors import UserError

SETTINGS: dict[str, dict[str, Any]] = {
    "batchtopk": {},
    "l1": {},
    "partition": {"n_delta": 4, "k_delta": 2},
    "dedicated": {"reserved_share": 0.25},
    "difference-sae": {},
    "stagewise-sae": {},
}
LATENT = 11
"""Of the fine-tuned model's own where a method divides them."""


def dictionary_of(method: str) -> BatchTopKCrosscoder:
    """Random directions, apart; about half of the latents are active at a token, the first one never."""
    config = CrosscoderConfig(WIDTH, 12, 4, method=method, **SETTINGS[method])  # pyright: ignore[reportArgumentType]
    made = new_dictionary(config, generator=torch.Generator().manual_seed(2), directions="apart")
    made.activation_scales = SCALES[: config.n_inputs] if method != "stagewise-sae" else (0.5, 0.5)
    made.threshold, made.delta_threshold, made.further_thresholds = 0.1, 0.1, (0.2,)
    if method == "dedicated":
        made.further_thresholds = (0.2, 0.3)
    with torch.no_grad():
        made.b_enc[0] = -1e6
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_of(*small_pair(WIDTH))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor([[1, *(3 + (5 * row + 7 * place) % 30 for place in range(9))] for row in range(3)])


@pytest.fixture(scope="module", params=SETTINGS)
def dictionary(request: pytest.FixtureRequest) -> BatchTopKCrosscoder:
    return dictionary_of(request.param)


def sites(pair: Pair, ids: Tensor) -> Tensor:
    """[rows, time, 2, d_model]: what the site gives in either model, read by plain hooks."""
    seen: list[Tensor] = []
    for side in pair:
        handle = side.layers[SITE.layer - 1].mlp.register_forward_hook(lambda *given: seen.append(given[2]))
        side.model(input_ids=ids)
        handle.remove()
    return torch.stack(seen, dim=-2)


@contextlib.contextmanager
def adding(pair: Pair, model: Model, added: Tensor) -> Iterator[Any]:
    """A plain hook that adds [..., d_model] to the model's site, at every place but the first."""
    side = pair[MODELS.index(model)]

    def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        changed = output + added
        changed[:, 0] = output[:, 0]
        return changed

    handle = side.layers[SITE.layer - 1].mlp.register_forward_hook(hook)
    yield side.model
    handle.remove()


def logits(opened: Any, ids: Tensor) -> Tensor:
    with opened as model:
        return model(input_ids=ids).logits


def values(dictionary: BatchTopKCrosscoder, given: Tensor, half: Model) -> Tensor:
    """[rows, time, latent]: with which each latent writes into a model."""
    x = dictionary.scale(given.flatten(0, 1))
    is_before = dictionary.config.method == "stagewise-sae" and half == "base"
    f = dictionary.encode_before(x) if is_before else dictionary.encode(x)  # pyright: ignore[reportAttributeAccessIssue]
    return f.view(*given.shape[:2], -1)


MEANS = torch.full((2, 12), 0.75, dtype=torch.float64)


def steer(
    pair: Pair,
    dictionary: BatchTopKCrosscoder,
    model: Model,
    factors: Mapping[int, float],
    ablate: Collection[int] = (),
    half: Model | None = None,
) -> Any:
    return steered(pair, SITE, dictionary, MEANS, model, factors, ablate, half)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_factor_0_changes_no_bit(pair, ids, dictionary, model):
    plain = pair[MODELS.index(model)].model(input_ids=ids).logits
    assert torch.equal(logits(steer(pair, dictionary, model, {LATENT: 0.0, 3: 0.0}), ids), plain)


@pytest.mark.parametrize("half", MODELS)
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_factor_adds_its_means_times_the_vector_of_the_half(pair, ids, dictionary, model, half):
    own = half_vectors(dictionary, MODELS.index(half), range(12))
    added = 2.0 * 0.75 * own[LATENT] - 0.5 * 0.75 * own[3]
    expected = logits(adding(pair, model, added), ids)
    if own[LATENT].any() and own[3].any():
        found = logits(steer(pair, dictionary, model, {LATENT: 2.0, 3: -0.5}, half=half), ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(found, pair[MODELS.index(model)].model(input_ids=ids).logits, atol=1e-3)
    if model == half:
        found = logits(steer(pair, dictionary, model, {LATENT: 2.0, 3: -0.5}), ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_an_ablated_latent_is_0_and_a_steered_one_beside_it_is_set(pair, ids, dictionary, model):
    f = values(dictionary, sites(pair, ids), model)[..., LATENT, None]
    assert (f > 0).any() and (f == 0).any()
    vector = half_vectors(dictionary, MODELS.index(model), range(12))[LATENT]
    for factor in (None, 0.0, 3.0):
        expected = logits(adding(pair, model, (0.75 * (factor or 0.0) - f) * vector), ids)
        found = logits(steer(pair, dictionary, model, {} if factor is None else {LATENT: factor}, [LATENT]), ids)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    ablated = logits(steer(pair, dictionary, model, {}, [LATENT]), ids)
    assert torch.equal(ablated, logits(steer(pair, dictionary, model, {LATENT: 0.0}, [LATENT]), ids))


def written(opened: Any, prompts: list[list[int]], n: int = 12, **how: Any) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    with opened as model, torch.no_grad():
        found = model.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=n, min_new_tokens=n, do_sample=False, **how
        )
    return found[:, longest:].tolist()


@pytest.mark.parametrize(
    ("factors", "ablate"), [({LATENT: 6.0}, ()), ({}, [LATENT, 3, 5]), ({LATENT: 6.0}, [LATENT, 3])]
)
@pytest.mark.parametrize("model", MODELS)
def test_a_batch_with_both_caches_writes_what_each_prompt_alone_does_without(pair, dictionary, model, factors, ablate):
    prompts = [[1, *(3 + (number * 11 + j) % 30 for j in range(4 + 3 * number))] for number in range(4)]
    together = written(steer(pair, dictionary, model, factors, ablate), prompts)
    alone = [written(steer(pair, dictionary, model, factors, ablate), [p], use_cache=False)[0] for p in prompts]
    assert together == alone
    if factors and half_vectors(dictionary, MODELS.index(model), range(12))[LATENT].any():
        assert together != written(contextlib.nullcontext(pair[MODELS.index(model)].model), prompts)


def test_an_adapter_is_switched_within_the_other_models_pass(pair):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = pair.instruct.model
    one, other = (get_peft_model(copy.deepcopy(base), lora).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    prompts, dictionary = [[1, *range(3, 12)], [1, 20, 21]], dictionary_of("batchtopk")
    for model in MODELS:
        expected = written(steer(pair_of(base, other.get_base_model()), dictionary, model, {}, [LATENT, 3, 5]), prompts)
        assert written(steer(pair_of(one), dictionary, model, {}, [LATENT, 3, 5]), prompts) == expected
        side = pair_of(one)[MODELS.index(model)]
        with side.active():
            assert written(contextlib.nullcontext(side.model), prompts) != expected


def test_turning_a_latent_up_runs_one_model(pair):
    runs: list[int] = []
    handles = [
        side.layers[0].register_forward_hook(lambda *_, number=number: runs.append(number))
        for number, side in enumerate(pair)
    ]
    prompt, dictionary = [[1, 5, 6]], dictionary_of("batchtopk")
    written(steer(pair, dictionary, "base", {LATENT: 2.0}, half="fine-tuned"), prompt)
    assert set(runs) == {0}
    written(steer(pair, dictionary, "base", {}, [LATENT]), prompt)
    assert set(runs) == {0, 1}
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_the_first_token_is_steered_where_it_is_no_bos(pair, ids):
    dictionary = dictionary_of("batchtopk")
    plain = pair.instruct.model(input_ids=ids).logits
    assert torch.equal(logits(steer(pair, dictionary, "base", {LATENT: 2.0}), ids)[:, 0], plain[:, 0])
    found = logits(steer(pair, dictionary, "base", {LATENT: 2.0}), ids[:, 1:])
    assert not torch.equal(found[:, 0], pair.instruct.model(input_ids=ids[:, 1:]).logits[:, 0])


@torch.no_grad()
def test_the_mean_is_over_the_tokens_where_a_latent_is_active(pair, ids, dictionary):
    given = sites(pair, ids)
    means = active_means(dictionary, given.flatten(0, 1).split(7), [0, 3, LATENT])
    for number, half in enumerate(MODELS):
        f = values(dictionary, given, half).flatten(0, 1).double()
        for latent in (3, LATENT):
            active = f[:, latent][f[:, latent] > 0]
            assert float(means[number, latent]) == pytest.approx(float(active.mean()), rel=1e-6)
    assert means[1, 0].isnan() and means[:, 5].isnan().all()


@pytest.mark.parametrize(
    ("method", "factors", "ablate", "half", "says"),
    [
        ("batchtopk", {12: 1.0}, (), None, "there is no latent 12; give one of this dictionary's, 0 to 11"),
        ("batchtopk", {}, [-1], None, "there is no latent -1"),
        ("batchtopk", {3: float("nan")}, (), None, "the factor nan is no finite number"),
        ("batchtopk", {0: 1.0}, (), None, "latent 0 is dead"),
        ("difference-sae", {3: 1.0}, (), "base", "has no vector for the base model; take that of the fine-tuned one"),
        ("dedicated", {LATENT: 1.0}, (), "base", r"take that of the fine-tuned one \(--from fine-tuned\)"),
    ],
)
def test_what_cannot_be_steered_is_said(pair, method, factors, ablate, half, says):
    means = MEANS.clone()
    means[:, 0] = torch.nan
    with pytest.raises(UserError, match=says):
        check_steering(dictionary_of(method), means, factors, ablate, half)
