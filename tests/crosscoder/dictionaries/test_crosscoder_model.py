"""The crosscoder's forward pass and selection, against float64 sums written from the formulas."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crosscoder.dictionaries.checkpoint import (
    load_dictionary,
    load_training_state,
    save_dictionary,
    save_tensors,
    save_training_state,
)
from crosscoder.dictionaries.config import CrosscoderConfig, ScoreNorm, TrainingConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder, batch_topk, sparse_product
from finqa.runtime.errors import UserError

D, F, B, K = 5, 7, 6, 2


def crosscoder(score_norm: ScoreNorm = "sum", seed: int = 0) -> BatchTopKCrosscoder:
    """A float64 crosscoder with nothing special about any of its numbers."""
    model = BatchTopKCrosscoder(CrosscoderConfig(D, F, K, score_norm)).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    model.threshold = 1.5
    model.activation_scales = (2.0, 3.0)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, 2, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reference_values(model: BatchTopKCrosscoder, x: Tensor) -> list[list[float]]:
    """f[i][j] = max(0, sum over models and features of x W_enc + b_enc), one number at a time."""
    rows = []
    for i in range(len(x)):
        row = []
        for j in range(F):
            total = model.b_enc[j].item()
            for m in range(2):
                for a in range(D):
                    total += x[i, m, a].item() * model.W_enc[m, a, j].item()
            row.append(max(0.0, total))
        rows.append(row)
    return rows


def reference_norm(model: BatchTopKCrosscoder, j: int) -> float:
    return sum(math.sqrt(sum(w.item() ** 2 for w in model.W_dec[j, m])) for m in range(2))


def test_values_are_the_rectified_sum_over_both_models(x):
    model = crosscoder()
    assert torch.allclose(model.activations(x), torch.tensor(reference_values(model, x), dtype=torch.float64))


def test_decoding_adds_each_models_vectors_and_bias(x):
    model = crosscoder()
    f = torch.rand(B, F, dtype=torch.float64)
    for i in range(B):
        for m in range(2):
            expected = model.b_dec[m] + sum(f[i, j] * model.W_dec[j, m] for j in range(F))
            assert torch.allclose(model.decode(f)[i, m], expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_decoding_without_gradients_is_the_same_product(share: float, device: str):
    """Few values that are not 0 are added up one by one: rows and columns without any among them."""
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(60, 100, generator=generator, dtype=torch.float64)
    f = torch.where(f < share, f, 0.0)
    f[[0, 7, -1]] = 0.0
    f, vectors = f.to(device), torch.randn(100, 12, generator=generator, dtype=torch.float64).to(device)
    with torch.no_grad():
        torch.testing.assert_close(sparse_product(f, vectors), f @ vectors)
        torch.testing.assert_close(sparse_product(f.T, f), f.T @ f)
        assert sparse_product(f[:0], vectors).shape == (0, 12)
    assert sparse_product(f.requires_grad_(), vectors).requires_grad


def test_inference_keeps_unscaled_values_whose_score_is_above_the_threshold(x):
    model = crosscoder()
    expected = [
        [value if value * reference_norm(model, j) > 1.5 else 0.0 for j, value in enumerate(row)]
        for row in reference_values(model, x)
    ]
    assert torch.allclose(model.encode(x), torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(model(x), model.decode(model.encode(x)))


def test_inference_of_one_sample_does_not_depend_on_the_others(x):
    model = crosscoder()
    assert torch.equal(model.encode(x)[:1], model.encode(x[:1]))


def test_a_score_equal_to_the_threshold_is_not_active():
    model = crosscoder()
    values = torch.ones(1, F, dtype=torch.float64)
    model.threshold = float(model.selection_norms()[3])
    assert model.select_by_threshold(values)[0, 3] == 0


def test_training_keeps_the_k_times_batch_largest_scores_of_the_whole_batch(x):
    model = crosscoder()
    scored = sorted(
        (value * reference_norm(model, j), i, j, value)
        for i, row in enumerate(reference_values(model, x))
        for j, value in enumerate(row)
    )
    expected = torch.zeros(B, F, dtype=torch.float64)
    for _, i, j, value in scored[-K * B :]:
        expected[i, j] = value
    selection = model.select_batch_topk(model.activations(x))
    assert torch.allclose(selection.values, expected)
    smallest = min(score for score, *_ in scored[-K * B :] if score > 0)
    assert math.isclose(float(selection.smallest_score), smallest)


def test_decoder_norms_decide_what_is_selected():
    model = crosscoder()
    model.W_dec.data[2] *= 1000
    values = torch.ones(B, F, dtype=torch.float64)
    assert bool((model.select_batch_topk(values).values[:, 2] == 1).all())


def test_the_joint_norm_is_the_length_of_both_decoder_vectors_together():
    model = crosscoder("l2")
    joint = [math.sqrt(sum(w.item() ** 2 for w in model.W_dec[j].flatten())) for j in range(F)]
    assert torch.allclose(model.selection_norms(), torch.tensor(joint, dtype=torch.float64))


def test_ties_never_select_more_than_asked_for():
    values = torch.ones(4, 5)
    assert int((batch_topk(values, values, 7).values > 0).sum()) == 7


def test_the_smallest_score_passes_over_zeros_and_is_infinite_where_none_is_positive():
    scores = torch.tensor([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
    assert float(batch_topk(scores, scores, 4).smallest_score) == 2
    assert float(batch_topk(torch.zeros(2, 3), torch.zeros(2, 3), 4).smallest_score) == math.inf


def test_gradients_reach_the_selected_values_alone():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    batch_topk(values, values.detach(), 2).values.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0, 0], [1, 1]]


def test_both_models_start_with_the_same_directions_of_the_asked_for_length():
    model = BatchTopKCrosscoder(CrosscoderConfig(D, F, K), decoder_norm=0.08)
    assert torch.equal(model.W_dec[:, 0], model.W_dec[:, 1])
    assert torch.allclose(model.W_dec.norm(dim=-1), torch.tensor(0.08))
    assert torch.equal(model.W_enc, model.W_dec.permute(1, 2, 0))


def test_scaling_multiplies_each_model_by_its_own_scale_and_is_undone(x):
    model = crosscoder()
    assert torch.allclose(model.scale(x)[:, 0], 2 * x[:, 0])
    assert torch.allclose(model.scale(x)[:, 1], 3 * x[:, 1])
    assert torch.allclose(model.unscale(model.scale(x)), x)
    assert torch.allclose(model.raw_decoder()[:, 1], model.W_dec[:, 1] / 3)


def test_scaling_has_a_gradient_where_it_was_used_without_one_before(x):
    model = crosscoder()
    model.activation_scales = (0.37, 1.9)  # of no other test: what is made of them is kept
    with torch.inference_mode():
        model.scale(x)
    raw = x.clone().requires_grad_()
    model.scale(raw).sum().backward()
    torch.testing.assert_close(raw.grad, torch.tensor([0.37, 1.9], dtype=x.dtype)[:, None].expand_as(x))


def test_a_saved_crosscoder_loads_as_the_same_function(tmp_path: Path):
    model = crosscoder().float()
    model.threshold = 0.1 + 0.2
    save_dictionary(model, tmp_path, training=None)
    loaded = load_dictionary(tmp_path)
    x = torch.randn(B, 2, D)
    assert torch.equal(loaded(x), model(x))
    assert (loaded.config, loaded.threshold, loaded.activation_scales) == (model.config, 0.1 + 0.2, (2.0, 3.0))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {"W_enc": (2, D, F), "b_enc": (F,), "W_dec": (F, 2, D), "b_dec": (2, D)}


def test_casting_the_module_leaves_the_threshold_alone():
    model = crosscoder()
    model.threshold = 0.123456789
    assert model.to(torch.bfloat16).threshold == 0.123456789


def test_a_missing_checkpoint_says_how_one_is_made(tmp_path: Path):
    with pytest.raises(UserError, match=r"neither a local folder nor a Hub repository; make it with train\.py"):
        load_dictionary(tmp_path / "nowhere")


def test_weights_of_another_shape_than_the_configuration_are_refused(tmp_path: Path):
    save_dictionary(crosscoder().float(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["crosscoder"]["n_latents"] = F + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not hold the crosscoder"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_scales": [-1.0, -1.0]},
        {"activation_scales": [float("inf"), 1.0]},
        {"threshold": "1.5"},
        {"delta_threshold": [1.0]},
        {"largest_norms": [1.0]},
        {"largest_norms": ["1.0", "1.0"]},
        {"activations": 3},
        {"crosscoder": {"n_latents": 1.5}},
        {"crosscoder": {"n_latents": True}},
        {"crosscoder": {"method": 7}},
        {"training": {"betas": [0.9]}},
        {"training": {"precision": None}},
        {"training": {"aux_weight": "equal"}},
    ],
    ids=str,
)
def test_a_checkpoint_whose_configuration_was_changed_is_refused_in_one_line(tmp_path: Path, change):
    save_dictionary(crosscoder().float(), tmp_path, training=asdict(TrainingConfig()))
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(config.get(name), dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_dictionary(tmp_path)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("change", ["flipped bit", "dtype", "NaN"])
def test_weights_that_were_changed_are_refused(tmp_path: Path, change, checksums):
    save_dictionary(crosscoder().float(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if change == "flipped bit":
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    else:
        tensors["W_enc"] = tensors["W_enc"].half() if change == "dtype" else tensors["W_enc"] * torch.nan
        save_tensors(path, tensors)
    if checksums:
        with pytest.raises(UserError, match="is not the file that was written; train the crosscoder again"):
            load_dictionary(tmp_path)
        return
    config = json.loads((tmp_path / "config.json").read_text())
    del config["files"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if change != "flipped bit":  # without a checksum, as in a checkpoint of an earlier version, that is not seen
        with pytest.raises(UserError, match="W_enc is not fp32 and finite"):
            load_dictionary(tmp_path)


@pytest.mark.parametrize("at", [b"\x80\x3f", b"done\\", b"progress", b"W_enc", b'"steps"', b"F32"], ids=str)
def test_a_training_state_with_a_flipped_bit_is_not_gone_on_with(tmp_path: Path, at: bytes):
    tensors = {"model.W_enc": torch.randn(4, 3), "steps": torch.tensor(7), "held": torch.ones(3, dtype=torch.bfloat16)}
    save_training_state(tmp_path, tensors, {"steps_done": 7})
    found = load_training_state(tmp_path)
    assert found is not None and found[1] == {"steps_done": 7}
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())
    path = tmp_path / "training_state.safetensors"
    data = bytearray(path.read_bytes())
    data[data.rindex(at) + 1] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not the file that was written; train from the start with --overwrite"):
        load_training_state(tmp_path)


def test_encoding_before_training_has_set_a_threshold_is_an_error(x):
    model = crosscoder()
    model.threshold = None
    with pytest.raises(UserError, match="no threshold yet"):
        model.encode(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": F + 1}, "more than the 7 latents"),
        ({"score_norm": "max"}, "score_norm is one of sum, l2"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        CrosscoderConfig(**({"d_model": D, "n_latents": F, "k": K} | change))
