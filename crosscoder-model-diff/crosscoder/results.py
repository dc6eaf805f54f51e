"""Findings -> files: figures (PNG and SVG), tables (CSV), analysis.json, dashboard.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscoder.analysis import figures, findings, tables
from crosscoder.analysis.findings import Findings
from crosscoder.analysis.measures import CLASSES
from crosscoder.analysis.token_kinds import kind_rows
from crosscoder.label.table import kept_labels
from finqa.runtime.manifest import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crosscoder.dashboard.records import DashboardConfig
    from crosscoder.dictionaries.model import BatchTopKCrosscoder


def figures_of(found: Findings) -> dict[str, Figure | None]:
    """Figures by the names of their files. One that does not apply is None: a comparison of two decoder vectors for a
    difference SAE and a stagewise SAE, a comparison of kinds of token for texts of one kind."""
    two, alive, statistics = found.two_models, found.alive, found.statistics
    by_kind, shown = found.by_kind, findings.frequencies(found)
    return {
        "explained_variance": figures.explained_variance_figure(found.explained),
        "explained_variance_by_kind": figures.explained_variance_by_kind_figure(by_kind) if len(by_kind) > 1 else None,
        "relative_decoder_norms": two and figures.relative_norm_figure(two.norms[alive]),
        "decoder_cosines": two and figures.cosine_figure(two.cosines[alive], two.norms[alive], found.classes),
        "latent_scaling": two and figures.latent_scaling_figure(two.scaling, two.kinds, statistics.dead),
        "firing_frequency": figures.frequency_figure(shown, int(statistics.dead.sum()), statistics.n_tokens),
    }


def write_figures(found: Findings, folder: Path) -> list[Path]:
    """<name>.png and <name>.svg of every figure that applies; the paths, in order.

    A figure of an earlier run that does not apply is deleted, so that none is taken for this dictionary's.
    """
    written = []
    for name, figure in figures_of(found).items():
        if figure is not None:
            written += figures.save_figure(figure, folder / name)
        else:
            for kind in ("png", "svg"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return written


def write_tables(found: Findings, folder: Path) -> list[Path]:
    """latents.csv, most_changed.csv, explained_variance.csv, and where latents have classes classes.csv and
    confirmed.csv. The labels of this very dictionary (crosscoder.label) stay in latents.csv."""
    names = ("latents", "most_changed", "explained_variance", "classes", "confirmed")
    paths = {name: folder / f"{name}.csv" for name in names}
    tables.write_latent_table(paths["latents"], found.rows, kept_labels(found.opened))
    tables.write_latent_table(paths["most_changed"], found.most_changed)
    tables.write_csv(paths["explained_variance"], kind_rows(found.by_kind))
    if found.two_models is None:
        for name in ("classes", "confirmed"):
            paths.pop(name).unlink(missing_ok=True)
    else:
        tables.write_csv(paths["classes"], class_rows(found))
        tables.write_latent_table(paths["confirmed"], [row for row in found.rows if row.confirmed])
    return list(paths.values())


EXTRA_FILES = ("stability.csv", "splicing.csv", "causal.csv", "causal.png", "causal.svg")
"""Files of readings that are made only when they are asked for, long after the others."""


def write_extra(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """<name>.csv, and the same rows as a section of the analysis.json that is there."""
    tables.write_csv(folder / f"{name}.csv", rows)
    path = folder / "analysis.json"
    write_json(path, json.loads(path.read_text()) | {name: rows})


def class_rows(found: Findings) -> list[dict[str, Any]]:
    """A row a class: how many latents it has that are active on some token, and what latent scaling says of them.

    `meets_fine_tuned_only` and `meets_instruct_only` count those that meet its conditions, whatever the class claims;
    `confirmed` and `fail_<condition>` are of the exclusive classes alone.
    """
    if found.two_models is None:
        return []
    rows = []
    for kind in CLASSES:
        row: dict[str, Any] = {"class": kind, "latents": found.classes.count(kind)}
        row |= {f"meets_{its}".replace("-", "_"): len(of.meet[kind]) for its, of in found.exclusive.items()}
        of = found.exclusive.get(kind)
        if of is not None:
            row |= {"confirmed": of.confirmed} | {f"fail_{name}": n for name, n in of.fail.items()}
        rows.append(row)
    return rows


def write_numbers(found: Findings, folder: Path) -> None:
    """analysis.json. Files of extra readings of an earlier run are deleted: they are not of these numbers."""
    write_json(folder / "analysis.json", findings.in_numbers(found))
    for name in EXTRA_FILES:
        (folder / name).unlink(missing_ok=True)


def write_effects(found: Findings, effects: Sequence[float], folder: Path) -> None:
    """The causal effect of every latent, as a further column of the latents.csv that is there."""
    path = folder / "latents.csv"
    added = tables.read_added(path, found.rows) | {tables.EFFECT: effects}
    more = {row.latent: {name: values[row.latent] for name, values in added.items()} for row in found.rows}
    tables.write_latent_table(path, found.rows, more)


def write_page(
    found: Findings,
    config: DashboardConfig,
    path: Path | None = None,
    second: tuple[str, BatchTopKCrosscoder] | None = None,
) -> str:
    """Write dashboard.html, and return a line about it.

    It has the labels and causal effects in latents.csv and analysis.json where those are of this dictionary. With a
    `second` dictionary, given with its name, it has each latent's partner there.
    """
    from crosscoder.dashboard.builder import build_dashboard
    from crosscoder.dashboard.matching import matched
    from crosscoder.dashboard.page import write_dashboard
    from crosscoder.dashboard.summary import summary_of

    folder = found.opened.results
    path = path or folder / "dashboard.html"
    numbers = json.loads((folder / "analysis.json").read_text()) if (folder / "analysis.json").exists() else {}
    own = found.opened.made(numbers.get("made_of", {}))
    added = tables.read_added(folder / "latents.csv", found.rows) if own else {}
    causal = numbers.get("causal", []) if tables.EFFECT in added else []
    summary = summary_of(found, causal, added.get("label_score", ()))
    if second is not None:
        columns, sentence = matched(found, *second)
        summary, added = replace(summary, sentences=(*summary.sentences, sentence)), added | columns
    dashboard = build_dashboard(found.opened, found.statistics, found.rows, summary, config, added)
    size = write_dashboard(path, dashboard)
    n = sum(page.examples is not None for page in dashboard.pages)
    return f"{path}: {size / 1e6:.1f} MB, {len(dashboard.pages):,} latents, {n:,} with examples"
