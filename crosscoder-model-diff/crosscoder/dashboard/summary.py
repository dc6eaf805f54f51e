"""What fine-tuning changed, in a few sentences: the first screen of a dashboard. Every number is in a table too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from crosscoder.analysis import tables
from crosscoder.analysis.measures import CLASSES
from crosscoder.dashboard.records import Summary
from crosscoder.label.table import mean_score

if TYPE_CHECKING:
    from crosscoder.analysis.findings import Findings
    from crosscoder.analysis.tables import LatentRow

N_CHANGED = 10
CAUSAL_LATENTS = 10
"""The summary has the effect of the largest patched set with at most this many latents."""
FEW = 5
"""Latents that a sentence names."""
TURNED = 0.1
"""Change from which a latent of a stagewise SAE is counted as turned: its vectors turned by 26 degrees."""
ORDERS = {
    "relative_decoder_norm": "by how far their relative decoder norm is from one half (0: the instruct model alone has "
    "the latent, 1: the fine-tuned model alone)",
    "change": "by how far they turned when the dictionary was trained on with the fine-tuned model",
    "difference_share": "by their share of the difference of the models",
}


def summary_of(
    found: Findings, causal: Sequence[Mapping[str, Any]] = (), label_scores: Sequence[float | None] = ()
) -> Summary:
    """Summary of an analysed dictionary; `causal` are the rows of its causal.csv (extra_analyses.causal_rows), and
    `label_scores` those of its latents."""
    changed = tables.most_changed(found.rows, N_CHANGED, found.config.min_frequency)
    shares = [row.completion_share for row in changed if row.completion_share is not None]
    written = sum(share > 0.5 for share in shares)
    where = (
        f"{written} of the {len(shares)} latents that changed most fire mostly in what the model writes, "
        f"{len(shares) - written} mostly in what it reads. Below they are listed"
        if shares  # plain texts have no completions
        else "The latents that changed most are listed below"
    )
    first = f"{where}, {ORDERS[leading(changed)]}."
    sentences = (first, explained(found), *counted(found.rows), *caused(causal), *labelled(label_scores))
    return Summary(sentences, tuple(row.latent for row in changed), leading(changed))


def leading(rows: Sequence[LatentRow]) -> str:
    """The column that says how much a latent of this dictionary changed."""
    columns = ("relative_decoder_norm", "change")
    return next((c for c in columns if any(getattr(row, c) is not None for row in rows)), "difference_share")


def explained(found: Findings) -> str:
    whose = {"instruct": "the instruct model", "fine-tuned": "the fine-tuned model", "difference": "their difference"}
    of = [f"{value:.1%} of the variance of {whose[name]}" for name, value in found.explained.parts.items()]
    l0 = found.explained.l0
    return (
        f"On held-out documents this dictionary explains {listed(of)}, with {l0:.1f} active latents per token (L0). "
        "What it does not explain of the difference, this page cannot show."
    )


def counted(rows: Sequence[LatentRow]) -> Iterator[str]:
    """How many latents are active, and how many changed, with the rule that says so."""
    alive = [row for row in rows if row.frequency > 0]
    text = f"{len(alive):,} of its {len(rows):,} latents are active; {len(rows) - len(alive):,} are dead."
    written = sorted((row.difference_share for row in alive), reverse=True)
    total = sum(written)
    half = sum(2 * so_far < total for so_far in accumulate(written)) + (total > 0)
    yield f"{text} {half:,} of the active ones make up half of the difference of the models that the dictionary gives."
    kinds = [row.kind for row in alive]
    if leading(rows) == "change":
        turned = sum((row.change or 0) > TURNED for row in alive)
        yield f"{turned:,} turned by more than {TURNED} when the dictionary was trained on with the fine-tuned model."
    elif leading(rows) == "relative_decoder_norm":
        of = [f"{kinds.count(kind):,} {'in between' if kind == 'between' else kind}" for kind in CLASSES]
        text = f"By the lengths of their decoder vectors (Δ) the active latents are {listed(of)}."
        confirmed = [row.confirmed for row in alive]
        exclusive = ("fine-tuned-only", "instruct-only", *(["both"] if "both" in confirmed else []))
        if any(row.nu_err is not None for row in rows):
            of = [f"{confirmed.count(kind):,} as {kind}{numbers(alive, kind)}" for kind in exclusive]
            text += (
                " Latent scaling is another test: it asks how much of each latent either model's activations hold, "
                f"whatever the lengths. It confirms {listed(of)}."
            )
        yield text


def numbers(rows: Sequence[LatentRow], kind: str) -> str:
    """The latents that are confirmed as a kind, where they are few."""
    found = [f"{row.latent}" for row in rows if row.confirmed == kind]
    return f" ({listed(found)})" if 0 < len(found) <= FEW else ""


def caused(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the best latents do together, put into the instruct model, beside random sets of as many."""
    of = {"direction": "sufficiency", "carrier": "own", "group": "all", "measure": "divergence"}
    placed = [row for row in rows if all(row[k] == v for k, v in of.items())]
    asked = [row for row in placed if row["recovered"] is not None]
    for row in placed:
        if row["kind"] == "ceiling" and row["recovered"] is None:
            yield (
                "Even all that this place in the model gives in the fine-tuned one does not bring the instruct model "
                f"nearer to it (KL {row['none']:.3g} without and {row['ceiling']:.3g} with it, {row['n']} documents), "
                "so there is no gap of which latents could close a share."
                + "".join(
                    f" With the {best['n_latents']} of the largest estimated effect alone it is {best['value']:.3g}."
                    for best in _largest(placed)
                )
            )
    if not (largest := _largest(asked)):
        return
    [best] = largest
    n = best["n_latents"]
    random = [row["recovered"] for row in asked if row["kind"] == "random sets" and row["n_latents"] == n]
    low, high = best["recovered_low"], best["recovered_high"]
    which, verb = (f"{n} latents", "close") if n > 1 else ("latent", "closes")
    yield (
        f"Added to the instruct model, the {which} of the largest estimated effect {verb} {best['recovered']:.0%} of "
        "the gap (KL) that this place in the model can close"
        + (f" (95% interval {low:.0%} to {high:.0%})" if low is not None else "")
        + (f"; random sets of as many close {sum(random) / len(random):.0%}." if random else ".")
    )


def labelled(scores: Sequence[float | None]) -> Iterator[str]:
    """How good the labels are, where any has a score."""
    if known := [score for score in scores if score is not None]:
        mean, low, high = mean_score(known)
        yield (
            "The labels are what a language model made of examples. Told a label alone, it says on which other "
            f"passages the latent fires with a mean score of {mean:.2f} (95% interval {low:.2f} to {high:.2f}, "
            f"{len(known)} labels); 0.5 is chance, and 1 always right."
        )


def _largest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The largest ranked set of at most CAUSAL_LATENTS; none where there is none."""
    ranked = [row for row in rows if row["kind"] == "ranked" and row["n_latents"] <= CAUSAL_LATENTS]
    return [max(ranked, key=lambda row: row["n_latents"])] if ranked else []


def listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
