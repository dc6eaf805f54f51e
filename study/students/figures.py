"""The figures of docs/finqa.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finqa.evaluation.accuracy_figure import COLORS
from study.students.plan import MAIN, NAMED, PLAIN, SAMPLES, STUDENTS, short

BARS = {
    "zero-shot": "zero-shot",
    "few-shot": "few-shot",
    "fine-tuned": "fine-tuned",
    f"fine-tuned-{SAMPLES}-samples": f"vote of {SAMPLES}",
}


def draw_accuracy(path: Path, figures: dict[str, Any]) -> None:
    """Accuracy on test by student and evaluation: strict as bars with 95% intervals, relaxed as marks."""
    from matplotlib.figure import Figure

    found = {
        (e["student"], e["evaluation"]): e["metrics"]
        for e in figures["evaluations"]
        if not e["run"] and e["split"] == "test" and e["evaluation"] in BARS
    }
    students = [name for name in map(short, STUDENTS) if any(student == name for student, _ in found)]
    figure = Figure(figsize=(1.6 + 2.6 * max(1, len(students)), 3.6), layout="constrained")
    axes = figure.subplots()
    for place, student in enumerate(students):
        there = [evaluation for evaluation in BARS if (student, evaluation) in found]
        for number, evaluation in enumerate(there):
            if metrics := found.get((student, evaluation)):
                at = place + (number - (len(there) - 1) / 2) * 0.2
                low, high = metrics["accuracy_interval"]
                share = metrics["accuracy"]
                hatch = "///" if "samples" in evaluation else None
                color = COLORS[evaluation.split("-8", maxsplit=1)[0]]  # pyright: ignore[reportArgumentType]
                axes.bar(at, share, 0.19, color=color, hatch=hatch, edgecolor="white", lw=0.5, label=BARS[evaluation])
                axes.errorbar(at, share, [[share - low], [high - share]], color="black", lw=0.8, capsize=2)
                axes.plot(at, metrics["accuracy_relaxed"], "D", color="black", ms=3.5, label="relaxed rule")
                inside = share > 0.04
                place_of_number = (at, 0.01 if inside else high + 0.01)
                axes.text(*place_of_number, f"{100 * share:.1f}", ha="center", va="bottom", fontsize=7,
                          color="white" if inside else "black",
                          bbox={"color": color, "pad": 0.8} if hatch else None)  # fmt: skip
    axes.set_xticks(range(len(students)), students)
    axes.set_ylim(0, max([0.7, *(m["accuracy_relaxed"] + 0.05 for m in found.values())]))
    axes.set_ylabel("execution accuracy")
    n = next(iter(found.values()))["n"] if found else 0
    axes.set_title(f"FinQA test, n = {n:,}; bars: strict rule with 95% interval", fontsize=9, loc="left")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, frameon=False, loc="upper right", ncols=2)
    figure.savefig(path, dpi=130)


def draw_curve(path: Path, figures: dict[str, Any], rows: Sequence[tuple[int, str]]) -> None:
    """Accuracy of the main student over the number of training rows, on a logarithmic axis.

    Its programs name their variables; dashes are other fine-tunes of that, stars those on all rows of plain programs.
    `rows` has the number of training rows and the run name of each point, the fewest first.
    """
    from matplotlib.figure import Figure

    found = {
        (e["run"], e["split"]): e["metrics"]
        for e in figures["evaluations"]
        if e["student"] == short(MAIN) and e["evaluation"] == "fine-tuned"
    }
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for split, color in (("test", COLORS["fine-tuned"]), ("dev", COLORS["zero-shot"])):
        there = [(n, found[run, split]) for n, run in rows if (run, split) in found]
        shares = [m["accuracy"] for _, m in there]
        low = [m["accuracy"] - m["accuracy_interval"][0] for _, m in there]
        high = [m["accuracy_interval"][1] - m["accuracy"] for _, m in there]
        axes.errorbar([n for n, _ in there], shares, [low, high], color=color, marker="o", ms=4, lw=1.2, capsize=2,
                      label=f"{split}, n = {there[0][1]['n']:,}" if there else split)  # fmt: skip
        for runs, mark in ((list(NAMED)[1:], "_"), (PLAIN, "*")):
            others = [found[run, split]["accuracy"] for run in runs if (run, split) in found]
            axes.plot([rows[-1][0]] * len(others), others, mark, color=color, ms=9)
    axes.set_xscale("log")
    axes.set_xticks([n for n, _ in rows], [f"{n:,}" for n, _ in rows])
    axes.minorticks_off()
    axes.set_xlabel("training rows")
    axes.set_ylabel("execution accuracy (strict)")
    axes.set_title(f"{short(MAIN)}; dashes: other fine-tunes, stars: plain programs", fontsize=8, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
