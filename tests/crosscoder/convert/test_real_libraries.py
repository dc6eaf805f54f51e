"""What is converted is the same function in the real library: values and reconstructions, both ways.

The libraries are no part of this project's environment; where one is missing its tests skip. To run them, in an
environment of its own beside this project's packages: `pip install sae-lens`, dictionary_learning from
github.com/science-of-finetuning/dictionary_learning, and for test_neuronpedia.py `pip install --no-deps sae-dashboard`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crosscoder.convert.__main__ import main
from crosscoder.convert.dictionary_learning import read_crosscoder, write_crosscoder
from crosscoder.convert.sae_lens import read_sae, write_sae
from crosscoder.dictionaries.checkpoint import load_dictionary, save_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig, Method, ScoreNorm
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.runtime.errors import UserError, report_errors

D, F, K = 24, 96, 6
TOLERANCE = 1e-5
"""Relative to the largest number of the other side."""


def dictionary(method: Method = "batchtopk", norm: ScoreNorm = "sum", centred: bool = True) -> BatchTopKCrosscoder:
    """Random, with decoder vectors of different lengths, scales and means; some of its latents are active on a token
    and some are not."""
    torch.manual_seed(0)
    of = {"partition": {"n_delta": 8, "k_delta": 2}, "dedicated": {"reserved_share": 0.1}}.get(method, {})
    model = new_dictionary(CrosscoderConfig(D, F, K, norm, method, **of))
    with torch.no_grad():
        if method != "difference-sae":
            model.W_dec.mul_(torch.rand(F, model.config.n_inputs, 1) + 0.5)
        for parameter in (model.W_enc, model.b_enc, model.b_dec):
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.activation_scales = (27.5, 0.31)[: model.config.n_inputs]
    model.activation_means = torch.randn(model.config.n_inputs, D) if centred else None
    with torch.no_grad():
        # As calibration leaves it: the score of some token, which is not active itself.
        scores = model.activations(model.scale(raw_activations(model))) * model.selection_norms()
        threshold = 0.0 if method == "l1" else float(scores.flatten().sort(descending=True).values[K * len(scores)])
    model.set_thresholds([threshold] * max(1, len(model.groups())))
    return model


def raw_activations(model: BatchTopKCrosscoder) -> torch.Tensor:
    """[token, 2, d_model], of the size that the model's scales are for."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor(model.activation_scales)
    return torch.randn(200, 2, D, generator=generator) / scales[:, None]


@torch.no_grad()
def outputs(model: BatchTopKCrosscoder, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[token, latent] values and [token, input, d_model] raw reconstructions."""
    values, scaled = model.reconstruct(model.scale(raw))
    return values, model.unscale(scaled)


def assert_same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max()
    assert 0.02 < (wanted[0] > 0).float().mean() < 0.9, "all or none are active, which says little"


@pytest.fixture(scope="module")
def fork() -> Any:
    """The dictionary_learning that has crosscoders: science-of-finetuning's; PyPI's of that name has none."""
    found = pytest.importorskip("dictionary_learning").dictionary
    if not hasattr(found, "BatchTopKCrossCoder"):
        pytest.skip("this dictionary_learning has no crosscoders; install science-of-finetuning's from GitHub")
    return found


@pytest.fixture(scope="module")
def lens() -> Any:
    return pytest.importorskip("sae_lens")


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command, in this process: its exit code and what it says."""

    def call(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, words)])
        try:
            code = report_errors(main)
        except SystemExit as stop:  # of the parser
            code = int(stop.code or 0)
        return code, "".join(capsys.readouterr())

    return call


OURS: list[tuple[Method, ScoreNorm, bool]] = [
    ("batchtopk", "sum", True),
    ("batchtopk", "l2", False),
    ("batchtopk", "none", True),
    ("l1", "sum", False),
]


# dictionary_learning


@pytest.mark.parametrize(("method", "norm", "centred"), OURS)
@torch.no_grad()
def test_the_library_computes_what_our_crosscoder_does(fork, tmp_path, method, norm, centred):
    model = dictionary(method, norm, centred)
    write_crosscoder(model, tmp_path / "theirs")
    theirs = fork.BatchTopKCrossCoder.from_pretrained(str(tmp_path / "theirs"), from_hub=True)
    raw = raw_activations(model)
    assert int(theirs.k) == K and theirs.has_activation_normalizer
    assert_same((theirs.encode(raw.clone()), theirs(raw.clone())), outputs(model, raw))


@pytest.mark.parametrize("kept", ["model.pt", "Hub"])
@pytest.mark.parametrize(("norm", "normalised"), [("CROSSCODER", True), ("SAE", True), ("NONE", False)])
@torch.no_grad()
def test_our_crosscoder_computes_what_the_librarys_does(fork, tmp_path, kept, norm, normalised):
    torch.manual_seed(2)
    raw = 5 * torch.randn(200, 2, D) + 1
    about = {"activation_mean": raw.mean(dim=0), "activation_std": raw.std(dim=0), "target_rms": 3.0}
    theirs = fork.BatchTopKCrossCoder(
        D, F, 2, k=K, code_normalization=getattr(fork.CodeNormalization, norm), **(about if normalised else {})
    )
    theirs.threshold.fill_(1.5)
    theirs.encoder.bias.data.normal_()
    if kept == "Hub":
        theirs.save_pretrained(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / kept)
    model = read_crosscoder(tmp_path / ("model.safetensors" if kept == "Hub" else kept))
    assert (model.config.k, model.threshold) == (K, 1.5)
    assert_same(outputs(model, raw), (theirs.encode(raw.clone()), theirs(raw.clone())))


def test_scores_that_no_dictionary_here_has_are_refused_by_their_name(fork, tmp_path):
    theirs = fork.BatchTopKCrossCoder(D, F, 2, k=K, code_normalization=fork.CodeNormalization.MIXED)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UserError, match="MIXED or DECOUPLED"):
        read_crosscoder(tmp_path / "model.pt")


# SAELens


@pytest.mark.parametrize("centred", [True, False])
@torch.no_grad()
def test_saelens_computes_what_our_difference_sae_does(lens, tmp_path, centred):
    model = dictionary("difference-sae", centred=centred)
    write_sae(model, tmp_path, {"model": "a/base", "layer": 3, "site": "mlp"})
    theirs = lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == "jumprelu" and theirs.cfg.metadata.model == "a/base"
    raw = raw_activations(model)
    difference = raw[:, 1] - raw[:, 0]
    values, reconstructed = outputs(model, raw)
    assert_same((theirs.encode(difference), theirs(difference)), (values, reconstructed[:, 0]))


@pytest.mark.parametrize("by_decoder_norm", [True, False])
@pytest.mark.parametrize("b_dec_first", [True, False])
@torch.no_grad()
def test_our_difference_sae_computes_what_saelens_batchtopk_sae_does(lens, tmp_path, by_decoder_norm, b_dec_first):
    torch.manual_seed(3)
    config = lens.BatchTopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=K, apply_b_dec_to_input=b_dec_first, rescale_acts_by_decoder_norm=by_decoder_norm
    )
    trained = lens.BatchTopKTrainingSAE(config)
    trained.topk_threshold.fill_(0.7)
    trained.W_dec.data.mul_(torch.rand(F, 1) + 0.5)
    for bias in (trained.b_enc, trained.b_dec):
        bias.data.normal_()
    trained.save_inference_model(tmp_path)
    theirs, model = lens.SAE.load_from_disk(tmp_path), read_sae(tmp_path)
    assert (model.config.k, model.config.method) == (K, "difference-sae")
    raw = 20 * torch.randn(200, 2, D)
    difference = raw[:, 1] - raw[:, 0]
    values, reconstructed = outputs(model, raw)
    assert_same((values, reconstructed[:, 0]), (theirs.encode(difference), theirs(difference)))


def test_thresholds_of_each_latents_own_are_refused(lens, tmp_path):
    theirs = lens.JumpReLUSAE(lens.JumpReLUSAEConfig(d_in=D, d_sae=F))
    theirs.threshold.data.uniform_(0.1, 2)
    theirs.save_model(tmp_path)
    with pytest.raises(UserError, match="threshold of its own for every latent, from 0"):
        read_sae(tmp_path, k=K)


def test_another_architecture_is_refused_by_its_name(lens, tmp_path):
    lens.StandardSAE(lens.StandardSAEConfig(d_in=D, d_sae=F)).save_model(tmp_path)
    with pytest.raises(UserError, match="is of a standard SAE"):
        read_sae(tmp_path, k=K)


# Without the libraries


@pytest.mark.parametrize(("method", "norm", "centred"), [*OURS, ("difference-sae", "sum", True)])
def test_a_dictionary_comes_back_by_the_command(convert, tmp_path, method: Method, norm: ScoreNorm, centred: bool):
    model = dictionary(method, norm, centred)
    save_dictionary(model, tmp_path / "ours", activations={"model": "a/base", "layer": 3})
    layout = "sae-lens" if method == "difference-sae" else "dictionary-learning"
    code, said = convert("--to", layout, tmp_path / "ours", tmp_path / "theirs")
    assert code == 0 and said.startswith(f"{method}: 96 latents, k 6, {model.config.n_inputs} x 24, threshold ")
    assert convert(tmp_path / "theirs", tmp_path / "back")[0] == 0
    back, raw = load_dictionary(tmp_path / "back"), raw_activations(model)
    assert back.activation_scales == pytest.approx(model.activation_scales)
    assert back.config.score_norm == norm and back.config.k == K
    assert_same(outputs(back, raw), outputs(model, raw))


@pytest.mark.parametrize(
    ("method", "layout", "says"),
    [
        ("partition", "dictionary-learning", "one threshold and one value for both models, and cannot hold partition"),
        ("stagewise-sae", "dictionary-learning", "cannot hold stagewise-sae; batchtopk and l1 can be converted"),
        ("difference-sae", "dictionary-learning", "cannot hold difference-sae; --to sae-lens takes it"),
        ("batchtopk", "sae-lens", "SAELens has no crosscoder, and cannot hold batchtopk"),
        ("dedicated", "sae-lens", "it takes difference-sae alone; --to dictionary-learning takes batchtopk and l1"),
    ],
)
def test_a_method_that_a_layout_cannot_hold_is_refused_with_the_one_that_can(tmp_path, method, layout, says):
    write = write_crosscoder if layout == "dictionary-learning" else lambda *where: write_sae(*where, {})
    with pytest.raises(UserError, match=says):
        write(dictionary(method), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_bad_words_end_in_one_line_with_the_remedy(convert, tmp_path: Path):
    save_dictionary(dictionary(), tmp_path / "ours")
    untrained = dictionary()
    untrained.threshold = None
    save_dictionary(untrained, tmp_path / "untrained")
    write_sae(dictionary("difference-sae"), tmp_path / "sae", {})
    (tmp_path / "empty").mkdir()
    settings = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    for words, says in (
        ([tmp_path / "ours", tmp_path / "new"], "is a checkpoint of this project already; say --to what"),
        ([tmp_path / "empty", tmp_path / "new"], "has no sae_weights.safetensors and no model.safetensors or model.pt"),
        ([tmp_path / "nothing", tmp_path / "new"], "is missing, here and on the Hub"),
        ([tmp_path / "sae", tmp_path / "ours"], "is there already, and nothing is replaced; give a new folder"),
        ([tmp_path / "sae", tmp_path / "new", "--scales", "2", "3"], "--scales takes 1 here, and 2 are given"),
        (["--to", "sae-lens", tmp_path / "empty", tmp_path / "new"], "no crosscoder at"),
        (["--to", "dictionary-learning", tmp_path / "untrained", tmp_path / "new"], "has no threshold yet"),
        (["--to", "saelens", tmp_path / "ours", tmp_path / "new"], "invalid choice: 'saelens'"),
    ):
        code, said = convert(*words)
        assert code and len(said.splitlines()) == 1 and says in said
        assert not (tmp_path / "new").exists()
    settings["metadata"].pop("k")
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(settings))
    assert "does not say k" in convert(tmp_path / "sae", tmp_path / "new")[1]
    assert convert(tmp_path / "sae", tmp_path / "new", "--k", "6")[0] == 0
