"""Published files become checkpoints of the same function, and nothing in them is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crosscoder.convert.dictionary_learning import read_crosscoder
from crosscoder.convert.files import read_tensors
from crosscoder.dictionaries.checkpoint import load_dictionary, save_dictionary
from finqa.runtime.errors import UserError
from finqa.runtime.paths import REPOSITORY

D, F, K = 5, 8, 3


class OlderCrosscoder(torch.nn.Module):
    """As the code keeps it that the published run started from."""

    def __init__(self) -> None:
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.randn(2, D, F))
        self.W_dec = torch.nn.Parameter(torch.randn(F, 2, D))
        self.b_enc = torch.nn.Parameter(torch.randn(F))
        self.b_dec = torch.nn.Parameter(torch.randn(2, D))
        self.register_buffer("k", torch.tensor(K, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(1.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """With its threshold, on scores by decoder norms."""
        f = torch.relu(torch.einsum("bmd,mdf->bf", x, self.W_enc) + self.b_enc)
        norms = self.W_dec.norm(dim=2).sum(dim=1)
        return torch.einsum("bf,fmd->bmd", f * (f * norms > self.threshold), self.W_dec) + self.b_dec


class _Part(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)


class LibraryCrosscoder(torch.nn.Module):
    """As dictionary_learning keeps it: encoder and decoder by layer (here model)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _Part(torch.randn(2, D, F), torch.randn(F))
        self.decoder = _Part(torch.randn(2, F, D), torch.randn(2, D))
        self.register_buffer("k", torch.tensor(K, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(1.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = torch.relu(torch.einsum("bld,ldf->bf", x, self.encoder.weight) + self.encoder.bias)
        norms = self.decoder.weight.norm(dim=2).sum(dim=0)
        f = f * (f * norms > self.threshold)
        return torch.einsum("bf,lfd->bld", f, self.decoder.weight) + self.decoder.bias


def published(folder: Path, model: torch.nn.Module, **settings: object) -> Path:
    """The file of weights, beside its settings."""
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "cfg.json").write_text(json.dumps(settings))
    return folder / "model.pt"


@pytest.mark.parametrize("kind", [OlderCrosscoder, LibraryCrosscoder])
@torch.no_grad()
def test_a_published_crosscoder_is_the_same_function_after_conversion(tmp_path: Path, kind):
    torch.manual_seed(0)
    original = kind()
    source = published(tmp_path / "published", original)
    save_dictionary(read_crosscoder(source, scales=(27.5, 27.1)), tmp_path / "converted")
    model = load_dictionary(tmp_path / "converted")
    x = torch.randn(20, 2, D)
    assert torch.allclose(model(x), original(x), atol=1e-5)
    assert (model.config.k, model.threshold, model.activation_scales) == (K, 1.25, (27.5, 27.1))


def test_the_command_writes_a_checkpoint(tmp_path: Path):
    torch.manual_seed(0)
    source = published(tmp_path / "published", OlderCrosscoder())
    command = [
        sys.executable,
        "-m",
        "crosscoder.convert",
        source,
        tmp_path / "converted",
        "--scales",
        "2",
        "3",
    ]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "8 latents, k 3, 2 x 5, threshold 1.25" in output.stdout
    assert load_dictionary(tmp_path / "converted").activation_scales == (2, 3)


def test_k_comes_from_the_configuration_where_the_weights_do_not_say(tmp_path: Path):
    model = OlderCrosscoder()
    del model.k, model.threshold
    converted = read_crosscoder(published(tmp_path / "of-cfg", model, batch_topk_init=2))
    assert (converted.config.k, converted.threshold) == (2, None)
    with pytest.raises(UserError, match="says k; give --k"):
        read_crosscoder(published(tmp_path / "nowhere", model))


def test_a_threshold_that_training_never_set_is_none(tmp_path: Path):
    model = OlderCrosscoder()
    model.threshold.fill_(-1.0)
    assert read_crosscoder(published(tmp_path / "published", model)).threshold is None


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path):
    source = tmp_path / "model.pt"
    torch.save({"W_enc": Hostile(tmp_path / "ran")}, source)
    with pytest.raises(UserError, match="holds more than tensors, or is damaged"):
        read_crosscoder(source)
    assert not (tmp_path / "ran").exists()
    torch.load(source, weights_only=False)
    assert (tmp_path / "ran").exists()  # so it was hostile


def test_a_damaged_file_is_refused(tmp_path: Path):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="is damaged"):
        read_tensors(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("W_dec", (2, F, D), r"W_dec of shape \(2, 8, 5\); its biases ask for \(8, 2, 5\)"),
        ("W_enc", (2, F, D), r"W_enc of shape \(2, 8, 5\); its biases ask for \(2, 5, 8\)"),
        ("b_dec", (3, D), "biases of shapes"),
    ],
)
def test_tensors_of_another_orientation_are_refused(tmp_path: Path, name, shape, message):
    model = OlderCrosscoder()
    setattr(model, name, torch.nn.Parameter(torch.zeros(shape)))
    with pytest.raises(UserError, match=message):
        read_crosscoder(published(tmp_path / "published", model))


def test_other_tensors_are_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match="has bias, weight, which are not those of a crosscoder"):
        read_crosscoder(published(tmp_path / "published", torch.nn.Linear(2, 2)))
