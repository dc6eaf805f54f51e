"""The dashboard's record: what is chosen from the firings, exactly; how it is written; that text stays text."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import started
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_activations import D_MODEL, planted_activations, write_store
from made_up_dashboards import HOSTILE, made_up_dashboard

from crosscoder.activations.layout import KINDS
from crosscoder.activations.store import ActivationStore
from crosscoder.analysis import tables
from crosscoder.analysis.findings import find
from crosscoder.analysis.lens import Unembedding
from crosscoder.analysis.statistics import LatentStatistics, latent_statistics
from crosscoder.dashboard.builder import build_dashboard, by_interest, token_texts
from crosscoder.dashboard.encoding import encode
from crosscoder.dashboard.examples import BANDS, ExampleMaker, quantise
from crosscoder.dashboard.firings import gather_firings, groups_within
from crosscoder.dashboard.matching import matched
from crosscoder.dashboard.page import packed, render, write_dashboard
from crosscoder.dashboard.records import LEVELS, Dashboard, DashboardConfig, Example, Summary
from crosscoder.dictionaries.checkpoint import save_dictionary
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.names import ActivationChoice, crosscoder_folder
from crosscoder.opening import OpenedCrosscoder
from finqa.models import students
from finqa.runtime.errors import UserError
from finqa.runtime.paths import Folders

N_LATENTS = 8
DEAD = 5
SUMMARY = Summary((), (), "frequency")


def reading_of(store: ActivationStore, student: Path, method: str = "batchtopk") -> OpenedCrosscoder:
    """An untrained dictionary of 8 latents, one of them dead, over the tokens of a real tokenizer."""
    tokenizer = students.load_tokenizer(str(student))
    store.token_id = store.token_id % len(tokenizer)
    groups = {"partition": {"n_delta": 3, "k_delta": 1}, "dedicated": {"reserved_share": 0.25}}.get(method, {})
    model = new_dictionary(CrosscoderConfig(D_MODEL, N_LATENTS, 2, method=method, **groups), generator=generator(2))
    if method == "batchtopk":
        model.activation_scales = store.config.activation_scales
        model.W_dec.data[3, 1] *= 20
    model.threshold = 0.05
    model.delta_threshold = 0.05 if method == "partition" else None
    model.further_thresholds = {"dedicated": (0.05, 0.05), "stagewise-sae": (0.05,)}.get(method, ())
    model.b_enc.data[DEAD] = -1e6
    unembedding = Unembedding(torch.ones(D_MODEL), torch.randn(len(tokenizer), D_MODEL, generator=generator(1)))
    return OpenedCrosscoder("made-up", model, store, store.split(0.1, 0), tokenizer, unembedding, Path("results"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(reading: OpenedCrosscoder, **settings: Any) -> Dashboard:
    statistics = statistics_of(reading)
    rows = tables.latent_table(reading.model, statistics, reading.store, reading.tokenizer, reading.unembedding)
    return build_dashboard(reading, statistics, rows, SUMMARY, DashboardConfig(**settings))


def statistics_of(reading: OpenedCrosscoder) -> LatentStatistics:
    return latent_statistics(reading.model, reading.store, torch.arange(len(reading.store)))


@pytest.fixture
def reading(store, tiny_student) -> OpenedCrosscoder:
    return reading_of(store, tiny_student)


@pytest.fixture
def f(reading) -> np.ndarray:
    """[token, latent]: all activations, at once."""
    store, model = reading.store, reading.model
    with torch.no_grad():
        return model.encode(model.scale(store.read(torch.arange(len(store))))).numpy()


# Firings


def test_the_firings_are_all_of_them_in_the_order_of_the_set(reading, f):
    chosen = torch.tensor([6, 0, DEAD, 3])
    largest = torch.from_numpy(f.max(axis=0))
    firings, histograms = gather_firings(reading.model, reading.store, chosen, largest, n_bins=7, batch_size=97)
    for i, latent in enumerate(chosen.tolist()):
        tokens, values = firings[i]
        assert tokens.tolist() == np.flatnonzero(f[:, latent]).tolist()
        np.testing.assert_allclose(values, f[f[:, latent] > 0, latent], rtol=1e-5)
    assert histograms.sum(dim=1).tolist() == (f > 0).sum(axis=0).tolist()
    expected = [
        np.histogram(f[f[:, j] > 0, j], bins=7, range=(0, float(f[:, j].max()) or 1))[0] for j in range(N_LATENTS)
    ]
    assert np.abs(histograms.numpy() - expected).sum() <= 2  # a value on a bin's edge may round to either side


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 60))
def test_groups_hold_every_latent_once_and_no_more_firings_than_allowed(n_firings, limit):
    latents = torch.arange(len(n_firings))
    groups = groups_within(latents, torch.tensor(n_firings, dtype=torch.int64), limit)
    assert torch.cat(groups).tolist() == latents.tolist()
    assert all(len(group) == 1 or sum(n_firings[j] for j in group) <= limit for group in groups if len(group))


def test_a_dashboard_built_in_many_passes_is_the_same(reading):
    assert built(reading, max_firings_held=300) == built(reading)


# Examples


def examples_of(page: Any) -> list[Example]:
    return [*page.examples.strongest, *(example for band in page.examples.bands for example in band.examples)]


def test_the_strongest_examples_are_the_peaks_of_the_documents_with_the_largest_peaks(reading, f):
    document = reading.store.document.numpy()
    for page in built(reading, n_strongest=6).pages:
        if page.latent == DEAD:
            assert page.examples is None
            continue
        values = f[:, page.latent]
        peaks = sorted((-values[document == d].max(), d) for d in range(len(reading.store.documents)))
        expected = [(-value, f"row-{d}") for value, d in peaks[:6] if value < 0]
        strongest = page.examples.strongest
        assert [example.document for example in strongest] == [document for _, document in expected]
        assert [values[e.first + e.peak] for e in strongest] == pytest.approx([value for value, _ in expected])


def test_questions_on_one_page_give_one_example_of_it():
    """Documents of 3 tokens: question, page, page. The first two have one page, the last two have no page at all."""
    ids = torch.tensor([1, 7, 8, 2, 7, 8, 3, 7, 9, 4, 4, 4, 5, 5, 5], dtype=torch.int32)
    kinds = torch.tensor([KINDS.index(kind) for kind in ["question", "passage", "table"] * 3 + ["question"] * 6])
    documents = [SimpleNamespace(id=f"row-{d}") for d in range(5)]
    store = MagicMock(token_id=ids, document=torch.arange(5).repeat_interleave(3), documents=documents)
    store.__len__.return_value = 15
    maker = ExampleMaker(store, DashboardConfig(), kinds)
    found = maker.examples(0, np.arange(15, dtype=np.int32), np.linspace(2, 1, 15, dtype=np.float32))
    assert found and [example.document for example in found.strongest] == ["row-0", "row-2", "row-3", "row-4"]


def test_an_example_holds_the_tokens_around_its_peak_of_one_document_with_their_activations(reading, f):
    store, document = reading.store, reading.store.document.tolist()
    for page in built(reading, tokens_before=9, tokens_after=4).pages:
        for example in examples_of(page) if page.examples else []:
            peak = example.first + example.peak
            near = range(max(0, peak - 9), min(len(store), peak + 5))
            same = [i for i in near if document[i] == document[peak]]
            assert same == list(range(example.first, example.first + len(example.token_ids)))
            assert list(example.token_ids) == store.token_id[same].tolist()
            assert example.document == store.documents[document[peak]].id
            values = f[same, page.latent]
            shown = np.array(example.levels) / LEVELS * page.max_activation
            np.testing.assert_allclose(shown, values, atol=page.max_activation / LEVELS)
            assert [level > 0 for level in example.levels] == [value > 0 for value in values]


def test_bands_are_quarters_of_the_firings_and_hold_their_examples(reading, f):
    for page in built(reading, n_per_band=3).pages:
        values = np.sort(f[f[:, page.latent] > 0, page.latent])
        for band in page.examples.bands if page.examples else ():
            inside = values[round(band.from_quantile * len(values)) : round(band.to_quantile * len(values))]
            assert (band.lowest, band.highest) == pytest.approx((inside[0], inside[-1]))
            for example in band.examples:
                assert band.lowest - 1e-6 <= f[example.first + example.peak, page.latent] <= band.highest + 1e-6
            assert len({example.document for example in band.examples}) == len(band.examples) > 0
        if page.examples:
            assert [band.from_quantile for band in page.examples.bands] == list(reversed(BANDS[:-1]))


def test_a_latent_that_fires_once_has_one_example_in_one_band(reading, f):
    # Takes off so much that of all values the largest alone stays positive.
    reading.model.b_enc.data[0] -= torch.from_numpy(f[:, 0]).topk(2).values.mean()
    reading.model.threshold = 0.0
    page = built(reading).pages[0]
    assert page.examples is not None
    assert len(page.examples.strongest) == len(page.examples.bands) == sum(page.histogram) == 1


def test_the_tokens_it_fires_on_are_those_with_the_largest_sums(reading, f):
    ids = reading.store.token_id.numpy()
    for page in built(reading, n_fires_on=4).pages:
        if page.examples is None:
            continue
        values = f[:, page.latent]
        sums = {int(token): values[ids == token].sum() for token in np.unique(ids)}
        uses = page.examples.fires_on
        assert [sums[use.token_id] for use in uses] == pytest.approx(sorted(sums.values(), reverse=True)[:4])
        for use in uses:
            fired = (ids == use.token_id) & (values > 0)
            assert (use.n_firings, use.share) == (fired.sum(), pytest.approx(fired.sum() / (ids == use.token_id).sum()))
            assert use.mean == pytest.approx(values[fired].mean(), rel=1e-4)


@given(st.floats(1e-3, 1e4), st.lists(st.floats(1e-6, 1.0), min_size=1))
def test_eight_bits_are_true_to_a_level_and_keep_what_is_active_active(largest, shares):
    values = np.array([share * largest for share in shares], np.float32)
    levels = quantise(values, largest)
    assert levels.min() >= 1
    error = np.abs(levels / LEVELS * largest - values)
    assert (error <= largest / LEVELS * np.where(levels == 1, 1, 0.5) * (1 + 1e-4)).all()


# What else a page shows


def test_the_nearest_latents_are_those_of_the_largest_cosine_without_itself_and_the_dead(reading):
    vectors = reading.model.raw_decoder().double().flatten(1).numpy()
    cosines = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    for page in built(reading, n_nearest=3).pages:
        others = [j for j in range(N_LATENTS) if j not in (page.latent, DEAD)]
        expected = sorted(others, key=lambda j, i=page.latent: -cosines[i, j])[:3]
        assert [j for j, _ in page.nearest] == expected
        assert [c for _, c in page.nearest] == pytest.approx([cosines[page.latent, j] for j in expected], abs=1e-5)


def test_only_so_many_latents_get_examples_and_they_lean_furthest(reading):
    pages = built(reading, n_with_examples=2).pages
    chosen = [page.latent for page in pages if page.examples]
    active = [page for page in pages if page.latent != DEAD]
    leaning = sorted(active, key=lambda page: -abs(page.values["relative_decoder_norm"] - 0.5))
    assert chosen == sorted(page.latent for page in leaning[:2])
    assert 3 in chosen
    assert all(page.context for page in active)


def test_a_negative_number_of_latents_with_examples_is_refused():
    with pytest.raises(UserError, match="at least 0, not -1"):
        DashboardConfig(n_with_examples=-1)


def test_a_difference_sae_has_one_direction_and_no_column_that_compares(store, tiny_student):
    dashboard = built(reading_of(store, tiny_student, "difference-sae"), n_with_examples=3)
    assert dashboard.directions == ("difference",)
    assert all(len(page.promoted) == 1 for page in dashboard.pages)
    keys = {column.key for column in dashboard.columns}
    assert {"frequency", "max_activation", "difference_share"} <= keys
    assert not keys & {"kind", "relative_decoder_norm", "delta", "cosine", "nu_err", "exclusivity", "instruct_norm"}
    # What it writes into the difference leads, in the table and among the latents that get examples.
    assert {column.key: column.in_table for column in dashboard.columns}["difference_share"]
    written = {page.latent: page.values["difference_share"] for page in dashboard.pages}
    chosen = {page.latent for page in dashboard.pages if page.examples}
    assert chosen == set(sorted(written, key=lambda j: -written[j])[:3])
    assert sum(written.values()) == pytest.approx(1)


@pytest.mark.parametrize("method", ["batchtopk", "l1"])
def test_a_crosscoder_has_every_column_that_compares_and_no_parts(store, tiny_student, method):
    dashboard = built(reading_of(store, tiny_student, method))
    columns = {column.key: column for column in dashboard.columns}
    assert {"kind", "relative_decoder_norm", "cosine", "frequency"} <= set(columns)
    assert "part" not in columns and not columns["difference_share"].in_table
    assert dashboard.directions == ("instruct", "fine-tuned")


def test_a_partition_says_which_latents_are_of_which_part(store, tiny_student):
    dashboard = built(reading_of(store, tiny_student, "partition"))
    assert [page.values["part"] for page in dashboard.pages] == ["shared"] * 5 + ["delta"] * 3
    for page in dashboard.pages[:5]:
        assert (page.values["kind"], page.values["relative_decoder_norm"]) == ("shared", pytest.approx(0.5))


def test_a_dedicated_crosscoder_says_whom_a_latent_is_reserved_for(store, tiny_student):
    dashboard = built(reading_of(store, tiny_student, "dedicated"))
    kinds = [page.values["kind"] for page in dashboard.pages]
    assert kinds == ["shared"] * 4 + ["instruct-only"] * 2 + ["fine-tuned-only"] * 2
    promoted = [[len(tokens) > 0 for tokens in page.promoted] for page in dashboard.pages]
    assert promoted == [[True, True]] * 4 + [[True, False]] * 2 + [[False, True]] * 2


def test_a_stagewise_sae_leads_with_the_latents_that_turned_furthest(store, tiny_student):
    reading = reading_of(store, tiny_student, "stagewise-sae")
    reading.model.W_dec.data[6, 1] = -reading.model.W_dec.data[6, 0]
    dashboard = built(reading, n_with_examples=1)
    columns = {column.key: column.in_table for column in dashboard.columns}
    assert columns["change"] and not columns.keys() & {"kind", "relative_decoder_norm", "nu_err"}
    assert [page.values["change"] for page in dashboard.pages] == pytest.approx([0] * 6 + [1, 0], abs=1e-6)
    assert [page.latent for page in dashboard.pages if page.examples] == [6]
    assert dashboard.directions == ("instruct", "fine-tuned")


def test_the_share_on_template_tokens_is_a_column_where_the_kinds_are_known(reading):
    assert "template_share" not in {column.key for column in built(reading).columns}
    kinds = torch.arange(len(reading.store)) % len(KINDS)
    statistics = latent_statistics(reading.model, reading.store, torch.arange(len(reading.store)), kinds=kinds)
    rows = tables.latent_table(reading.model, statistics, reading.store, reading.tokenizer, reading.unembedding)
    dashboard = build_dashboard(reading, statistics, rows, SUMMARY)
    assert {column.key: column.in_table for column in dashboard.columns}["template_share"]
    assert statistics.template_share is not None
    assert [page.values["template_share"] for page in dashboard.pages] == statistics.template_share.tolist()


def test_a_decoder_vector_without_length_promotes_nothing(reading):
    reading.model.W_dec.data[2, 0] = 0
    pages = built(reading, n_promoted=6).pages
    assert [len(tokens) for tokens in pages[2].promoted] == [0, 6]
    assert [len(tokens) for tokens in pages[1].promoted] == [6, 6]


def test_confirmed_latents_of_any_class_are_the_first_to_get_examples(reading):
    statistics = statistics_of(reading)
    rows = tables.latent_table(reading.model, statistics, reading.store, reading.tokenizer, reading.unembedding)
    last = by_interest([row for row in rows if row.frequency > 0], statistics)[-1].latent
    rows[last] = replace(rows[last], kind="between", confirmed="fine-tuned-only")
    dashboard = build_dashboard(reading, statistics, rows, SUMMARY, DashboardConfig(n_with_examples=1))
    assert [page.latent for page in dashboard.pages if page.examples] == [last]
    assert "that latent scaling confirms" in dashboard.chosen_by


def test_latent_scaling_has_columns_only_where_it_was_done(reading):
    assert "nu_err" not in {column.key for column in built(reading).columns}
    statistics = statistics_of(reading)
    rows = tables.latent_table(reading.model, statistics, reading.store, reading.tokenizer, reading.unembedding)
    rows = [replace(row, nu_err=0.25 if row.latent == 1 else None) for row in rows]
    dashboard = build_dashboard(reading, statistics, rows, SUMMARY)
    assert {"nu_err", "exclusivity"} <= {column.key for column in dashboard.columns}
    assert [dashboard.pages[j].values["exclusivity"] for j in (0, 1)] == [None, 0.75]


def test_a_latent_has_the_family_of_the_questions_that_it_is_most_active_on(reading, f):
    assert "family" not in {column.key for column in built(reading).columns}
    names = [document.id for document in reading.store.documents]
    of = {name: ("ratio (new)", "change (known)", "sum (known)")[i % 3] for i, name in enumerate(names)}
    dashboard = built(replace(reading, families=of))
    document = reading.store.document.numpy()
    for page in dashboard.pages:
        sums = np.bincount(document, f[:, page.latent], len(names))
        if (sums > 0).sum() < 10:
            assert page.values["family"] is page.values["family_times"] is None
            continue
        means = {
            family: np.mean([sums[i] for i, name in enumerate(names) if of[name] == family]) for family in of.values()
        }
        best = max(means, key=lambda family: means[family])
        assert page.values["family"] == best
        assert page.values["family_times"] == pytest.approx(means[best] / sums.mean(), rel=1e-5)
    assert dashboard.pages[DEAD].values["family"] is None != dashboard.pages[0].values["family"]
    assert "family" not in {
        column.key for column in built(replace(reading, families={names[0]: "ratio (new)"})).columns
    }


def test_latents_of_another_seed_are_matched_with_those_that_are_alike(reading):
    order = torch.randperm(N_LATENTS, generator=generator(5))
    second = new_dictionary(reading.model.config, generator=generator(2))
    second.load_state_dict(reading.model.state_dict())
    second.activation_scales, second.threshold = reading.model.activation_scales, reading.model.threshold
    second.W_dec.data, second.W_enc.data = reading.model.W_dec.data[order], reading.model.W_enc.data[..., order]
    second.b_enc.data = reading.model.b_enc.data[order]
    found = find(reading)
    columns, sentence = matched(found, "another", second)
    partner = [None if j == DEAD else order.tolist().index(j) for j in range(N_LATENTS)]
    assert columns["match"] == partner
    alive = [j for j in range(N_LATENTS) if j != DEAD]
    assert [columns["match_cosine"][j] for j in alive] == pytest.approx([1] * 7, abs=1e-5)
    for key, own in {"match_tokens": "top_tokens", "match_frequency": "frequency", "match_kind": "kind"}.items():
        assert [columns[key][j] for j in alive] == [getattr(found.rows[j], own) for j in alive]
    assert sentence.startswith("Of the 7 active latents 7 have a partner of their own in another (7 active latents)")


def test_latents_of_another_method_are_matched_by_what_they_add_to_the_difference(reading):
    second = new_dictionary(CrosscoderConfig(D_MODEL, N_LATENTS, 2, method="difference-sae"), generator=generator(4))
    second.threshold = 0.0
    second.b_enc.data += 10
    second.W_dec.data[:, 0] = torch.nn.functional.normalize(reading.model.difference_decoder().flip(0), dim=-1)
    columns, _ = matched(find(reading), "another", second)
    assert columns["match"] == [None if j == DEAD else N_LATENTS - 1 - j for j in range(N_LATENTS)]
    assert set(columns["match_kind"]) == {None}
    assert [columns["match_cosine"][j] for j in (0, 3, 7)] == pytest.approx([1, 1, 1], abs=1e-5)


def test_tokens_keep_the_space_that_a_tokenizer_drops_from_the_first():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3, "▁net": 4, "net": 5, "<0x0A>": 6, "<0xE2>": 7}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert fast.decode([4]) == "net"
    assert token_texts(fast, [4, 5, 6, 7]) == {4: " net", 5: "net", 6: "\n", 7: "<0xE2>"}


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("’", "<0xE2><0x80><0x99>"),
        ("漢", "<0xE6><0xBC><0xA2>"),
        ("é", "<0xC3><0xA9>"),
        ("a <0xE2>", "a <0xE2>"),
        ("net", "net"),
    ],
)
def test_bytes_that_are_part_of_a_character_are_marks_and_not_boxes(tiny_student, text, spelled):
    tokenizer = students.load_tokenizer(str(tiny_student))
    ids: Any = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[i] for i in ids) == spelled


# Written down


def decoded(data: dict[str, Any], stored: list[int]) -> tuple[str, list[str], list[int], int]:
    document, stretch, first, n, peak, *fired = stored
    words = [data["vocabulary"][token] for token in data["stretches"][stretch][first : first + n]]
    levels = [0] * n
    for i, level in zip(fired[::2], fired[1::2], strict=True):
        levels[i] = level
    return data["documents"][document], words, levels, peak


@pytest.mark.parametrize("around", [(24, 12), (2, 1)])
def test_examples_read_back_as_they_were_and_text_that_they_share_stands_once(reading, around):
    dashboard = built(reading, tokens_before=around[0], tokens_after=around[1])
    data = encode(dashboard)
    shown: set[int] = set()
    for page in dashboard.pages:
        if page.examples is None:
            assert data["examples"][page.latent] == 0
            continue
        strongest, bands, _ = data["examples"][page.latent]
        written = [*strongest, *(example for band in bands for example in band[4])]
        for stored, example in zip(written, examples_of(page), strict=True):
            words = [dashboard.vocabulary[token] for token in example.token_ids]
            assert decoded(data, stored) == (example.document, words, list(example.levels), example.peak)
            shown.update(range(example.first, example.first + len(words)))
    assert sum(map(len, data["stretches"])) == len(shown)


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_hostile_text_ends_no_element_and_reads_back_as_it_was(tmp_path):
    page = render(made_up_dashboard(20, 20))
    assert page.lower().count("<script") == page.lower().count("</script") == 3
    assert "<!--" not in page
    data = data_of(page)
    assert set(HOSTILE) <= set(data["vocabulary"])
    assert html.escape(data["title"]) in page
    assert write_dashboard(tmp_path / "new" / "page.html", made_up_dashboard(20, 20)) == len(page.encode())
    assert (tmp_path / "new" / "page.html").read_bytes() == page.encode()


@given(st.text() | st.text(alphabet="<>/!-script&]"))
def test_data_in_a_page_hold_no_mark_up(text):
    written = packed({text: [text]})
    assert re.fullmatch(r"[A-Za-z0-9+/]+=*", written)
    assert json.loads(gzip.decompress(base64.b64decode(written))) == {text: [text]}
    assert packed({text: [text]}) == written


def test_a_page_of_16384_latents_is_a_few_megabytes():
    assert len(render(made_up_dashboard(16_384, 1024)).encode()) < 8e6


def test_the_page_may_run_its_own_scripts_and_load_nothing():
    page = render(made_up_dashboard(3, 3))
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    scripts = re.findall(r'<script(?: type="text/plain" id="script")?>(.*?)</script>', page, re.DOTALL)
    style = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)[0]

    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    assert (
        policy
        == f"default-src 'none'; style-src {hashed(style)}; script-src {' '.join(hashed(scripts[i]) for i in (1, 0))}"
    )


def test_figures_that_are_no_number_are_left_out(reading):
    statistics = statistics_of(reading)
    rows = tables.latent_table(reading.model, statistics, reading.store, reading.tokenizer, reading.unembedding)
    rows[0] = replace(rows[0], cosine=float("nan"))
    data = data_of(render(build_dashboard(reading, statistics, rows, SUMMARY)))
    assert data["values"]["cosine"][0] is None


# The command


def command(*arguments: object, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    words = ["-m", "crosscoder.dashboard", *arguments]
    if not python:
        return started.run(words)
    return subprocess.run([sys.executable, *python, *map(str, words)], capture_output=True, text=True, timeout=300)


def test_help_imports_no_torch():
    done = command("--help", python=("-X", "importtime"))
    assert "--examples-for" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


@pytest.mark.slow
def test_the_command_builds_the_dashboard_of_a_crosscoder_on_disk(tiny_student, tmp_path):
    run = students.StudentRun("FinQA-mini", str(tiny_student), students.settings_for(str(tiny_student)))
    choice, folders = ActivationChoice(run), Folders(data=tmp_path / "data")
    write_store(folders.activations(choice.name), planted_activations(400, 64, 16))
    config = folders.activations(choice.name) / "config.json"
    config.write_text(
        config.read_text().replace('"fingerprint"', f'"model": {json.dumps(str(tiny_student))}, "fingerprint"')
    )
    dictionary = new_dictionary(CrosscoderConfig(64, 12, 2), generator=generator(2))
    dictionary.threshold = 0.05
    save_dictionary(dictionary, crosscoder_folder(folders, choice.crosscoder_name))
    names = ("FinQA-mini", tiny_student, "--data-dir", folders.data, "--results-dir", tmp_path / "results")
    done = command(*names, "--examples-for", 5, "--compare", crosscoder_folder(folders, choice.crosscoder_name))
    assert done.returncode == 0, done.stderr
    path = tmp_path / "results" / choice.crosscoder_name / "dashboard.html"
    assert str(path) in done.stdout
    data = data_of(path.read_text())
    assert data["title"] == choice.crosscoder_name
    assert sum(map(bool, data["examples"])) == 5
    assert any(value is not None for value in data["values"]["nu_err"])
    assert all(value is not None for value in data["values"]["template_share"])
    assert dict(data["facts"])["model"] == "tiny-student"
    own = [j if largest else None for j, largest in enumerate(data["largest"])]
    assert data["values"]["match"] == own != [None] * 12
    assert "have a partner of their own" in data["summary"]["sentences"][-1]
    assert str(tmp_path) not in path.read_text()


def test_names_without_a_crosscoder_give_one_line(tiny_student, tmp_path):
    done = command("FinQA-mini", tiny_student, "--data-dir", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: no crosscoder in")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_dictionary_of_16384_latents_stays_under_20_megabytes(tmp_path):
    """With examples for the default number of latents, no two of which share text."""
    dashboard = made_up_dashboard(16_384, 1138)
    assert sum(page.examples is not None for page in dashboard.pages) >= DashboardConfig.n_with_examples
    assert write_dashboard(tmp_path / "page.html", dashboard) < 20e6
