"""docs/reference/model-diff/: what `make demo` reads from its crosscoder, to look at without running anything.

    python -m mini.diff_reference [--results-dir crosscoder-model-diff/results]

Copies figures, tables and dashboard of the demo's analysis, takes pictures of the dashboard (light, dark, and on a
phone; needs chromium and playwright), and writes README.md over them, with every number from analysis.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from finqa.runtime.errors import UserError, report_errors
from finqa.runtime.paths import REPOSITORY, write_atomically
from mini.reference import revision, wrapped

REFERENCE = REPOSITORY / "docs" / "reference" / "model-diff"
RESULTS = REPOSITORY / "crosscoder-model-diff" / "results"
NAME = "pocket-mistral-FinQA-mini-layer3-mlp_1k_samples_batchtopk"
FIGURES = (
    "explained_variance",
    "explained_variance_by_kind",
    "relative_decoder_norms",
    "decoder_cosines",
    "latent_scaling",
    "firing_frequency",
)
TABLES = ("classes.csv", "explained_variance.csv", "most_changed.csv", "analysis.json", "dashboard.html")
WIDE, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", type=Path, default=RESULTS, help="(default: %(default)s)")
    args = parser.parse_args()
    results = args.results_dir / NAME
    if not (results / "dashboard.html").exists():
        raise UserError(f"{results} has no dashboard.html; make it with: make demo")
    print(f"written: {write_reference(results)}")


def write_reference(results: Path, folder: Path = REFERENCE, pictures: bool = True) -> Path:
    """What is in `folder` already is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in (*(f"{figure}.png" for figure in FIGURES), *TABLES):
        shutil.copy(results / name, folder / name)
    taken = take_pictures(folder) if pictures else []
    found = json.loads((results / "analysis.json").read_text())
    made = json.loads((results / "analysis.run.json").read_text())
    write_atomically(folder / "README.md", readme(found, made, taken))
    return folder


def take_pictures(folder: Path) -> list[str]:
    """Of the table in a light and a dark page, of the most changed latent's page, and of that on a phone."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise UserError("the pictures need playwright: pip install playwright") from error
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise UserError("the pictures need a browser: apt-get install -y chromium")
    address = (folder / "dashboard.html").resolve().as_uri()
    latent = f"#latent={most_changed(json.loads((folder / 'analysis.json').read_text()))}"
    wanted = {
        "dashboard_light": ({"viewport": WIDE, "color_scheme": "light"}, ""),
        "dashboard_dark": ({"viewport": WIDE, "color_scheme": "dark"}, latent),
        "dashboard_phone": ({"viewport": PHONE, "is_mobile": True, "device_scale_factor": 2}, latent),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (settings, where) in wanted.items():
            page: Any = browser.new_context(**settings).new_page()
            page.goto(address + where)
            page.wait_for_selector("html[data-ready]")
            page.wait_for_timeout(500)  # what is drawn after it is ready
            page.screenshot(path=folder / f"{name}.png")
        browser.close()
    return list(wanted)


def most_changed(found: dict[str, Any]) -> int:
    return found["most_changed"]["latents"][0]


def readme(found: dict[str, Any], made: dict[str, Any], pictures: list[str]) -> str:
    captions = dict(zip(FIGURES, map(" ".join, captions_of(found)), strict=True))
    lines = ["# The model diff of pocket-mistral, by the demo's crosscoder", "", *wrapped(seen(found)), ""]
    for figure in FIGURES:
        lines += [f"## {figure.replace('_', ' ').capitalize()}", "", *wrapped(captions[figure]), ""]
        lines += [f"![{figure.replace('_', ' ')}]({figure}.png)", ""]
    lines += ["## Dashboard", ""]
    lines += wrapped(
        "[dashboard.html](dashboard.html) is one file that needs no network: download it and open it. Every latent has "
        f"its examples there; the page in the dark picture and on the phone is of latent {most_changed(found)}, whose "
        "relative norm is farthest from 1/2."
    )
    lines += ["", *(line for name in pictures for line in (f"![{name.replace('_', ', ')}]({name}.png)", ""))]
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers", "nnsight"))
    lines += wrapped(
        f"Made by `make demo` and `python -m mini.diff_reference`; analysed at {revision(made)}, {made['device']}, "
        f"Python {made['python']}, {versions}. One fine-tuning seed, one dictionary seed. The tables: "
        + ", ".join(f"[{name}]({name})" for name in TABLES[:-1])
        + "."
    )
    return "\n".join([*lines, ""])


def seen(found: dict[str, Any]) -> str:
    """What the figures say in plain words, from the figures."""
    explained, classes, latents = found["explained_variance"], found["classes"], found["latents"]
    dictionary, activations = found["dictionary"], found["activations"]
    only = classes["fine-tuned-only"]
    return (
        f"A BatchTopK crosscoder of {dictionary['n_latents']:,} latents (k {dictionary['k']}) read both models at "
        f"layer {activations['layer']} of 5 ({activations['site']}), on {found['n_tokens']:,} tokens of "
        f"{found['n_documents']} test questions. On {found['n_held_out_documents']} held-out documents "
        f"it explains {explained['instruct']:.1%} of the base's variance and {explained['fine_tuned']:.1%} of the "
        f"fine-tuned model's, but {explained['difference']:.1%} of the variance of their difference, which is what a "
        f"diff is about. Of the {latents['alive']:,} latents that are alive {classes['shared']} are shared, "
        f"{classes['between']} in between, {only} fine-tuned-only and {classes['instruct-only']} instruct-only. "
        + (
            "Fine-tuning added four families of questions to this model, and the published way of looking, by "
            "decoder norms, points at no latent for them."
            if only == 0
            else "docs/study.md asks whether they are what fine-tuning added."
        )
        + " Which methods do find something, with controls, is the subject of [the study](../../study.md)."
    )


def captions_of(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """One for each of FIGURES: what is drawn, and the number to take away."""
    by_kind = {row["kind"]: row for row in found["explained_variance_by_kind"]}
    kinds = sorted((row for kind, row in by_kind.items() if kind != "all"), key=lambda row: row["difference"])
    worst, best = kinds[0], kinds[-1]
    norm, cosine, frequency = (found[name] for name in ("relative_decoder_norm", "decoder_cosine", "frequency"))
    shown = found["latent_scaling"]["shown"]
    n_shown, n_left = (sum(of[key] for of in shown.values()) for key in ("n", "too_few"))
    exclusive = sum(of["regions"]["exclusive"] for of in shown.values())
    return [
        (f"Of each model and of fine-tuned less instruct, on {found['n_held_out_tokens']:,} held-out tokens.",),
        (
            f"The difference is explained best on tokens of the {best['kind']} ({best['difference']:.1%}, "
            f"n {best['n_tokens']:,}) and worst on those of the {worst['kind']} ({worst['difference']:.1%}, "
            f"n {worst['n_tokens']:,}): the mean is of each kind's own tokens.",
        ),
        (
            f"0 is a latent that only the instruct model writes, 1 one of the fine-tuned model alone. The median of "
            f"{norm['n']:,} is {norm['median']:.3f}; no class but shared and in between is reached.",
        )
        if not (found["classes"]["fine-tuned-only"] or found["classes"]["instruct-only"])
        else (f"0 is instruct-only, 1 fine-tuned-only; the median of {norm['n']:,} is {norm['median']:.3f}.",),
        (
            "Whether both models write a latent in one direction: the median cosine of the two decoder vectors is "
            f"{cosine['median']:.3f} (n {cosine['n']:,}).",
        ),
        (
            "How strongly each latent is needed in the instruct model, relative to the fine-tuned one, for what the "
            f"dictionary leaves unexplained (error) and for its reconstruction. {n_shown} latents are drawn, "
            f"{exclusive} of them in the region of exclusive ones; {n_left} fire too seldom for a slope.",
        ),
        (f"Half of the {frequency['n']:,} latents are active on fewer than {frequency['median']:.2%} of the tokens.",),
    ]


if __name__ == "__main__":
    sys.exit(report_errors(main))
