"""Reading a crosscoder: the table of latents, the logit lens, and the figures."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_activations import D_MODEL

from crosscoder.activations.layout import KINDS, TEMPLATE, token_texts
from crosscoder.analysis import figure_data, figures, tables
from crosscoder.analysis import measures as analysis
from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.analysis.lens import Unembedding, promoted_tokens, read_unembedding
from crosscoder.analysis.statistics import LatentStatistics, latent_statistics
from crosscoder.analysis.token_kinds import KindExplained
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from finqa.models import students
from finqa.runtime.errors import UserError


@pytest.fixture
def model(store) -> BatchTopKCrosscoder:
    model = BatchTopKCrosscoder(CrosscoderConfig(D_MODEL, 8, 2), generator=torch.Generator().manual_seed(2))
    model.activation_scales = store.config.activation_scales
    model.threshold = 0.5
    model.W_dec.data[3, 1] *= 20
    model.b_enc.data[5] = -1e6
    return model


@pytest.fixture
def tokenizer(tiny_student, store) -> Any:
    """A real tokenizer; the ids of the store are brought within its vocabulary."""
    tokenizer = students.load_tokenizer(str(tiny_student))
    store.token_id = store.token_id % len(tokenizer)
    return tokenizer


@pytest.fixture
def kinds(store) -> torch.Tensor:
    """Every token of a kind, in turn."""
    return torch.arange(len(store)) % len(KINDS)


@pytest.fixture
def statistics(model, store, kinds) -> LatentStatistics:
    return latent_statistics(model, store, torch.arange(len(store)), kinds=kinds)


@pytest.fixture
def rows(model, store, tokenizer, statistics) -> list[tables.LatentRow]:
    weight = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(1))
    return tables.latent_table(model, statistics, store, tokenizer, Unembedding(torch.ones(D_MODEL), weight))


def values(model, store) -> torch.Tensor:
    """[token, latent]"""
    with torch.no_grad():
        return model.encode(model.scale(store.read(torch.arange(len(store)))))


# The table of latents


def test_every_latent_has_a_row_and_a_dead_one_says_nothing_of_tokens(rows):
    assert [row.latent for row in rows] == list(range(8))
    dead = rows[5]
    assert (dead.frequency, dead.max_activation, dead.top_tokens, dead.example) == (0, 0, "", "")
    assert (dead.template_share, dead.difference_share) == (0, 0)


def test_the_example_is_the_token_of_the_largest_activation_in_its_document(rows, model, store, tokenizer):
    f = values(model, store)
    texts = token_texts(tokenizer, store.token_id.unique().tolist())
    for j in (0, 3):
        best = int(f[:, j].argmax())
        assert rows[j].max_activation == pytest.approx(f[best, j].item())
        same_document = [i for i in range(len(store)) if store.document[i] == store.document[best]]
        shown = [i for i in same_document if best - 12 <= i <= best + 6]
        marked = [f"«{texts[int(store.token_id[i])]}»" if i == best else texts[int(store.token_id[i])] for i in shown]
        assert rows[j].example == "".join(marked)


def test_tokens_are_shown_with_the_space_that_they_begin_with(store, tokenizer):
    (space,) = (i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) == "Ġthe")
    assert tables.Contexts(store, tokenizer).tokens([space]) == "' the'"


def test_the_share_on_template_tokens_is_of_activation_not_of_tokens(rows, model, store, kinds):
    f = values(model, store).double()
    template = torch.isin(kinds, torch.tensor([KINDS.index(kind) for kind in TEMPLATE]))
    for j in range(8):
        total = f[:, j].sum()
        expected = float(f[template, j].sum() / total) if total > 0 else 0.0
        assert rows[j].template_share == pytest.approx(expected, rel=1e-5)


def test_the_share_of_the_difference_is_what_a_latent_alone_writes_into_it(rows, model, store):
    """Decode one latent at a time, in the models' own units."""
    f = values(model, store)
    alone = []
    for j in range(8):
        only = torch.zeros_like(f)
        only[:, j] = f[:, j]
        vectors = model.unscale(model.decode_without_bias(only)).detach().double()
        alone.append(float(model.difference(vectors).pow(2).sum()))
    shares = [row.difference_share for row in rows]
    assert shares == pytest.approx([each / sum(alone) for each in alone], rel=1e-4)
    assert sum(shares) == pytest.approx(1)


def test_the_most_changed_lean_furthest_to_either_model_and_dead_ones_are_never_among_them(model, store, tokenizer):
    model.W_dec.data[6, 0] *= 30
    statistics = latent_statistics(model, store, torch.arange(len(store)))
    unembedding = Unembedding(torch.ones(D_MODEL), torch.eye(30, D_MODEL))
    rows = tables.latent_table(model, statistics, store, tokenizer, unembedding)
    changed = tables.most_changed(rows, 8)
    assert [row.latent for row in changed[:2]] == [6, 3]
    assert [row.kind for row in changed[:2]] == ["instruct-only", "fine-tuned-only"]
    assert 5 not in [row.latent for row in changed]
    assert rows[3].template_share is None


def test_latents_that_are_active_too_rarely_are_left_out_of_the_most_changed(rows):
    floor = sorted(row.frequency for row in rows)[4]
    assert {row.latent for row in tables.most_changed(rows, 8, floor)} == {
        row.latent for row in rows if row.frequency > floor
    }


def test_a_vector_without_length_has_no_cosine_and_promotes_nothing(
    model, store, tokenizer, statistics, tmp_path: Path
):
    model.W_dec.data[2, 0] = 0
    unembedding = Unembedding(torch.ones(D_MODEL), torch.eye(30, D_MODEL))
    rows = tables.latent_table(model, statistics, store, tokenizer, unembedding)
    assert (rows[2].cosine, rows[2].promoted_instruct) == (None, "")
    assert rows[2].promoted and rows[1].promoted_instruct
    tables.write_latent_table(tmp_path / "latents.csv", rows)
    assert list(csv.DictReader((tmp_path / "latents.csv").open(newline="")))[2]["cosine"] == ""


def test_the_table_reads_back_from_csv(rows, tmp_path: Path):
    tables.write_latent_table(tmp_path / "latents.csv", rows)
    read = list(csv.DictReader((tmp_path / "latents.csv").open(newline="")))
    assert [row["example"] for row in read] == [row.example for row in rows]
    assert [float(row["cosine"]) for row in read] == [row.cosine for row in rows]


# The logit lens


def test_the_logit_lens_multiplies_by_the_final_gain_and_the_unembedding():
    generator = torch.Generator().manual_seed(0)
    gain, weight = torch.rand(4, generator=generator), torch.randn(9, 4, generator=generator)
    directions = torch.randn(3, 4, generator=generator)

    def logit(direction: torch.Tensor, token: int) -> float:
        return sum(direction[a].item() * gain[a].item() * weight[token, a].item() for a in range(4))

    expected = [tuple(sorted(range(9), key=lambda token, d=d: -logit(d, token))[:2]) for d in directions]
    assert promoted_tokens(directions, Unembedding(gain, weight), 2) == expected
    assert promoted_tokens(0 * directions[:1], Unembedding(gain, weight), 2) == [()], "no length, no direction"


def test_tied_weights_are_found_without_loading_the_model(tiny_student):
    loaded: Any = students.load_base(str(tiny_student), torch.float32, "cpu")
    weight = loaded.get_output_embeddings().weight
    unembedding = read_unembedding(str(tiny_student), len(weight))
    assert torch.equal(unembedding.weight, weight)
    # What pads the vocabulary is no token.
    assert torch.equal(read_unembedding(str(tiny_student), 300).weight, weight[:300])
    assert torch.equal(unembedding.norm_weight, loaded.model.norm.weight)


def test_a_model_without_these_tensors_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no tensor model\.norm\.weight"):
        read_unembedding(str(tmp_path), 300)


# What the figures of latents show


@pytest.mark.parametrize("n_tokens", [7, 2000, 1_260_000])
def test_every_frequency_that_a_latent_can_have_lies_in_a_bin_and_no_bin_is_of_none(n_tokens):
    firings = torch.arange(1, n_tokens + 1)[:5000]
    firings = torch.cat([firings, torch.tensor([n_tokens // 2, n_tokens])]).unique()
    (shown,) = figure_data.frequencies(firings.double() / n_tokens, n_tokens).values()
    assert shown.n == len(firings)
    edges = torch.tensor(shown.edges) * n_tokens
    assert (edges[1:].floor() - edges[:-1].floor()).min() >= 1


def test_frequencies_are_split_by_class_without_the_dead():
    kinds: list[analysis.LatentClass] = ["shared", "shared", "between", "instruct-only"]
    shown = figure_data.frequencies(torch.tensor([0.5, 0.0, 0.25, 0.0]), 100, kinds)
    assert {kind: of.n for kind, of in shown.items()} == {"shared": 1, "between": 1}


def test_what_is_not_a_number_is_in_no_bin():
    found = figure_data.histogram(torch.tensor([0.0, 0.5, 1.0, torch.nan, 2.0]), torch.tensor([0.0, 0.5, 1.0]))
    assert found.counts == [1, 2]


def test_every_latent_is_in_one_stretch_of_the_axis_of_norms():
    norms = torch.rand(3000, 2, generator=torch.Generator().manual_seed(0)) ** 3
    counts = figure_data.class_counts(norms)
    kinds = analysis.classify(analysis.delta(norms))
    assert sum(count.n for count in counts) == 3000
    for kind in analysis.CLASSES:
        assert sum(count.n for count in counts if count.kind == kind) == kinds.count(kind) > 0
    assert [count.low for count in counts[1:]] == [count.high for count in counts[:-1]]
    below = analysis.relative_decoder_norm(norms) < 0.5
    left = sum(kind == "between" and b for kind, b in zip(kinds, below.tolist(), strict=True))
    assert counts[1].n == left


def scaling_of(*cases: tuple[int, float, float, float]) -> LatentScaling:
    """A latent for every (firings, own slope, nu_err, nu_rec), the same by either model's probe."""
    n = torch.tensor([case[0] for case in cases])
    own = torch.tensor([case[1] for case in cases], dtype=torch.float64)
    err, rec = (torch.tensor([case[i] for case in cases], dtype=torch.float64) * own for i in (2, 3))

    def beta(other: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack([own, other], dim=-1), torch.stack([other, own], dim=-1)], dim=1)

    return LatentScaling(n, beta(err), beta(rec))


def test_latents_are_placed_by_latent_scaling_and_what_is_left_out_is_counted():
    cases = [
        (100, 1.0, 0.1, 0.3),
        (100, 1.0, 0.9, 0.3),
        (100, 1.0, 0.1, 0.8),
        (100, 1.0, 0.9, 0.8),
        (49, 1.0, 0.1, 0.3),
        (100, -1.0, 0.1, 0.3),
        (100, 1.0, 2.5, 0.3),
        (100, 1.0, torch.nan, 0.3),
        (100, 1.0, 0.1, 0.3),
    ]
    dead = torch.tensor([False] * 8 + [True])
    shown = figure_data.scaling_points(scaling_of(*cases), ["fine-tuned-only"] * 9, dead)
    assert list(shown) == ["fine-tuned-only"]
    points = shown["fine-tuned-only"]
    assert (points.latents, points.too_few, points.outside) == ([0, 1, 2, 3], 1, 3)
    assert points.regions == dict.fromkeys(figure_data.REGIONS, 1)
    assert points.nu_err == pytest.approx([0.1, 0.9, 0.1, 0.9])
    assert points.nu_rec == pytest.approx([0.3, 0.3, 0.8, 0.8])


def test_an_instruct_only_latent_is_placed_by_its_own_models_probe():
    scaling = scaling_of((100, 1.0, 0.1, 0.8))
    scaling.beta_err[0, 1, 0] = 1.5
    points = figure_data.scaling_points(scaling, ["instruct-only"], torch.tensor([False]))["instruct-only"]
    assert points.nu_err == pytest.approx([0.1])
    points = figure_data.scaling_points(scaling, ["shared"], torch.tensor([False]))["shared"]
    assert points.nu_err == pytest.approx([1.5])


# The figures


def heights(axes: Any) -> list[float]:
    return [bar.get_height() for bar in axes.patches]


def texts_of(axes: Any) -> list[str]:
    return [text.get_text().strip().replace("\n", " ") for text in axes.texts]


def test_the_norm_figure_counts_each_class(model):
    (axes,) = figures.relative_norm_figure(analysis.decoder_norms(model)).axes
    assert texts_of(axes) == ["instruct only 0", "between 0", "shared 7", "between 0", "fine-tuned only 1"]
    drawn = next(patch for patch in axes.patches if hasattr(patch, "get_data"))
    assert drawn.get_data().values.tolist() == figure_data.relative_norms(analysis.decoder_norms(model)).counts


def test_the_cosine_figure_has_a_point_for_every_latent_that_has_a_cosine(model):
    model.W_dec.data[2, 0] = 0
    norms, cosines = analysis.decoder_norms(model), analysis.decoder_cosines(model)
    figure = figures.cosine_figure(cosines, norms)
    (axes,) = figure.axes
    points = [tuple(point) for scatter in axes.collections for point in scatter.get_offsets().tolist()]
    relative = analysis.relative_decoder_norm(norms)
    expected = [(float(relative[j]), float(cosines[j])) for j in range(8) if j != 2]
    assert torch.allclose(torch.tensor(sorted(points)), torch.tensor(sorted(expected)))
    assert axes.get_title(loc="left").startswith("1 latents")
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["shared (6)", "between (0)", "instruct-only (0)", "fine-tuned-only (1)"]


def test_the_scaling_figure_draws_the_points_and_says_what_it_leaves_out():
    scaling = scaling_of((100, 1.0, 0.1, 0.3), (100, 1.0, 0.9, 1.1), (3, 1.0, 1.0, 1.0))
    kinds: list[analysis.LatentClass] = ["fine-tuned-only", "shared", "shared"]
    figure = figures.latent_scaling_figure(scaling, kinds, torch.zeros(3, dtype=torch.bool))
    (axes,) = figure.axes
    points = [point for scatter in axes.collections for point in scatter.get_offsets().tolist()]
    assert sorted(points) == [pytest.approx([0.1, 0.3]), pytest.approx([0.9, 1.1])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "shared (0 of 1)",
        "fine-tuned-only (1 of 1)",
    ]
    assert [text.get_text() for text in figure.texts] == ["left out: 1 with under 50 firings, 0 without a usable slope"]


def test_a_large_scatter_is_an_image_within_the_svg(tmp_path: Path):
    sizes = {}
    for n in (100, 20_000):
        generator = torch.Generator().manual_seed(0)
        figure = figures.cosine_figure(torch.rand(n, generator=generator), torch.ones(n, 2))
        _, svg = figures.save_figure(figure, tmp_path / str(n))
        sizes[n] = svg.stat().st_size, "<image" in svg.read_text()
    assert [embedded for _, embedded in sizes.values()] == [False, True]
    assert sizes[20_000][0] < 5 * sizes[100][0]


def test_the_frequency_figure_says_how_many_latents_are_dead():
    shown = figure_data.frequencies(torch.tensor([0.5, 0.0, 0.25]), 100)
    (axes,) = figures.frequency_figure(shown, 1, 100).axes
    assert axes.get_title(loc="left") == "100 tokens; 1 latents are active on none"
    assert sum(axes.patches[0].get_data().values) == 2


def test_the_bars_are_the_explained_variances():
    explained = analysis.ExplainedVariance(0.9, 0.8, 0.85, -0.2, 25.0, 1000)
    (axes,) = figures.explained_variance_figure(explained).axes
    assert heights(axes) == [0.9, 0.8, -0.2]
    assert axes.get_ylim()[0] < -0.2


def kind_explained(kind: str, *explained: float | None) -> KindExplained:
    instruct, fine_tuned, difference = explained
    of = analysis.ExplainedVariance(instruct, fine_tuned, instruct, difference or 0.0, 5.0, 1234)
    return KindExplained(kind, of, of, 0.5, 0.5)


def test_the_figure_by_kind_shows_every_value_and_says_those_that_are_off_the_axis():
    found = [kind_explained("all", 0.9, 0.8, 0.4), kind_explained("end", 0.7, torch.nan, -7.25)]
    (axes,) = figures.explained_variance_by_kind_figure(found).axes
    drawn = {line.get_label(): line.get_xdata() for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert {name: list(x) for name, x in drawn.items()} == {
        "instruct": [0.9, 0.7],
        "fine-tuned": [0.8],
        "difference": [0.4, figures.LOWEST_SHOWN],
    }
    assert texts_of(axes) == ["-7.2"]
    assert axes.get_xlim()[0] < figures.LOWEST_SHOWN
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all  (1,234)", "end  (1,234)"]


def test_the_figure_by_kind_of_a_difference_sae_has_the_difference_alone():
    (axes,) = figures.explained_variance_by_kind_figure([kind_explained("all", None, None, 0.4)]).axes
    assert [line.get_label() for line in axes.lines if not str(line.get_label()).startswith("_")] == ["difference"]


def test_the_figure_by_kind_does_not_draw_the_template_beside_its_parts():
    found = [kind_explained(kind, 0.9, 0.8, 0.4) for kind in ("all", "template", "chat", "frame", "end")]
    (axes,) = figures.explained_variance_by_kind_figure(found).axes
    assert [label.get_text().split()[0] for label in axes.get_yticklabels()] == ["all", "chat", "frame", "end"]


def record_of(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1 / step, "explained_variance": [0.5, 0.6], "dead_share": 0.1} | more


@pytest.mark.parametrize("new", [0, 1, 2])
def test_the_training_figure_has_the_difference_where_the_log_has_it(new):
    records = [record_of(step) for step in range(1, 4 - new)]
    records += [record_of(step, explained_variance_of_difference=0.3) for step in range(4 - new, 4)]
    variance = figures.training_figure(records).axes[1]
    lines = {line.get_label(): torch.tensor(line.get_ydata()) for line in variance.lines}
    assert ("difference" in lines) == (new > 0)
    assert new == 0 or lines["difference"].isfinite().tolist() == [False] * (3 - new) + [True] * new


def test_the_training_figure_of_stages_shows_the_model_that_each_reads():
    records = [record_of(step, explained_variance=[step / 10], stage=int(step > 2)) for step in range(1, 5)]
    lines = {line.get_label(): list(line.get_ydata()) for line in figures.training_figure(records).axes[1].lines}
    assert set(lines) == {"instruct", "fine-tuned"}
    assert lines["instruct"][:2] == [0.1, 0.2] and lines["fine-tuned"][2:] == [0.3, 0.4]


def test_figures_are_written_as_png_and_as_the_same_svg_for_the_same_data(model, tmp_path: Path):
    for name in ("first", "second"):
        norms = analysis.decoder_norms(model)
        png, _ = figures.save_figure(figures.relative_norm_figure(norms), tmp_path / name)
        assert png.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_figure_is_as_wide_as_a_column_and_its_type_is_not_below_six_points(model, tmp_path: Path):
    figure = figures.relative_norm_figure(analysis.decoder_norms(model))
    assert figure.get_size_inches()[0] == figures.WIDTH
    figures.save_figure(figure, tmp_path / "norms")
    (axes,) = figure.axes
    sizes = [text.get_fontsize() for text in (*axes.get_xticklabels(), *axes.texts, axes.xaxis.label)]
    assert min(sizes) >= 6
    svg = (tmp_path / "norms.svg").read_text()
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    assert width and float(width[1]) == pytest.approx(72 * figures.WIDTH)


def test_a_log_without_records_gives_an_empty_figure_not_an_error(tmp_path: Path):
    assert figures.save_figure(figures.training_figure([]), tmp_path / "training")
