"""Reading a crosscoder: the table of latents, the logit lens, and the figures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_activations import D_MODEL

from crosscoder.config import CrosscoderConfig
from crosscoder.model import BatchTopKCrosscoder
from crosscoder.reading import analysis, figures, tables
from crosscoder.reading.lens import Unembedding, promoted_tokens, read_unembedding
from crosscoder.reading.statistics import latent_statistics
from finqa import students
from finqa.errors import UserError


@pytest.fixture
def model(store) -> BatchTopKCrosscoder:
    model = BatchTopKCrosscoder(CrosscoderConfig(D_MODEL, 8, 2), generator=torch.Generator().manual_seed(2))
    model.activation_scales = store.config.activation_scales
    model.threshold = 0.5
    model.W_dec.data[3, 1] *= 20
    model.b_enc.data[5] = -1e6
    return model


class Letters:
    """Decodes a token id as `<id>`, so that a table shows which ids it was made from."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


@pytest.fixture
def rows(model, store) -> list[tables.LatentRow]:
    statistics = latent_statistics(model, store, torch.arange(len(store)))
    unembedding = Unembedding(torch.ones(D_MODEL), torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(1)))
    return tables.latent_table(model, statistics, store, Letters(), unembedding)  # type: ignore[arg-type]


def test_every_latent_has_a_row_and_a_dead_one_says_nothing_of_tokens(rows):
    assert [row.latent for row in rows] == list(range(8))
    dead = rows[5]
    assert (dead.frequency, dead.max_activation, dead.top_tokens, dead.example) == (0, 0, "", "")


def test_the_example_is_the_token_of_the_largest_activation_in_its_document(rows, model, store):
    with torch.no_grad():
        f = model.encode(model.scale(store.read(torch.arange(len(store)))))
    best = int(f[:, 0].argmax())
    assert rows[0].max_activation == pytest.approx(f[best, 0].item())
    before, token, after = rows[0].example.replace("»", "«").split("«")
    assert token == f"<{store.token_id[best]}>"
    same_document = [i for i in range(len(store)) if store.document[i] == store.document[best]]
    around = [f"<{store.token_id[i]}>" for i in same_document if best - 12 <= i <= best + 6]
    assert before + token + after == "".join(around)


def test_the_latent_that_leans_most_comes_first_and_dead_ones_never(rows):
    leaning = tables.most_fine_tuned(rows, 8)
    assert leaning[0].latent == 3
    assert leaning[0].kind == "fine-tuned-only"
    assert 5 not in [row.latent for row in leaning]


def test_the_table_reads_back_from_csv(rows, tmp_path: Path):
    tables.write_latent_table(tmp_path / "latents.csv", rows)
    read = list(csv.DictReader((tmp_path / "latents.csv").open(newline="")))
    assert [row["example"] for row in read] == [row.example for row in rows]
    assert [float(row["cosine"]) for row in read] == [row.cosine for row in rows]


def test_the_logit_lens_multiplies_by_the_final_gain_and_the_unembedding():
    generator = torch.Generator().manual_seed(0)
    gain, weight = torch.rand(4, generator=generator), torch.randn(9, 4, generator=generator)
    directions = torch.randn(3, 4, generator=generator)

    def logit(direction: torch.Tensor, token: int) -> float:
        return sum(direction[a].item() * gain[a].item() * weight[token, a].item() for a in range(4))

    expected = [sorted(range(9), key=lambda token, d=d: -logit(d, token))[:2] for d in directions]
    assert promoted_tokens(directions, Unembedding(gain, weight), 2).tolist() == expected


def test_tied_weights_are_found_without_loading_the_model(tiny_student):
    unembedding = read_unembedding(str(tiny_student))
    loaded: Any = students.load_base(str(tiny_student), torch.float32, "cpu")
    assert torch.equal(unembedding.weight, loaded.get_output_embeddings().weight)
    assert torch.equal(unembedding.norm_weight, loaded.model.norm.weight)


def test_a_model_without_these_tensors_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no tensor model\.norm\.weight"):
        read_unembedding(str(tmp_path))


def heights(axes: Any) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def test_the_norm_figure_counts_each_class(model):
    norms = analysis.decoder_norms(model)
    (axes,) = figures.relative_norm_figure(norms).axes
    assert [text.get_text() for text in axes.texts] == ["instruct-only\n0", "shared\n7", "fine-tuned-only\n1"]


def test_the_cosine_figure_holds_the_shared_latents_alone(model):
    (axes,) = figures.cosine_figure(analysis.decoder_cosines(model), analysis.decoder_norms(model)).axes
    assert sum(heights(axes)) == 7


def test_the_bars_are_the_explained_variances():
    explained = analysis.ExplainedVariance(0.9, 0.8, 0.85, -0.2, 25.0, 1000)
    (axes,) = figures.explained_variance_figure(explained).axes
    assert heights(axes) == [0.9, 0.8, -0.2]
    assert axes.get_ylim()[0] < -0.2


def test_figures_are_written_as_png_and_as_the_same_svg_for_the_same_data(model, tmp_path: Path):
    for name in ("first", "second"):
        png, svg = figures.save_figure(figures.relative_norm_figure(analysis.decoder_norms(model)), tmp_path / name)
        assert png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert svg.exists()


def test_a_log_without_records_gives_an_empty_figure_not_an_error(tmp_path: Path):
    assert figures.save_figure(figures.training_figure([]), tmp_path / "training")
