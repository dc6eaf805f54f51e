"""README.md and docs/*.md name only what is in the tree, and README's figures are those of the pages behind it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finqa.runtime.paths import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
GENERATED = [*sorted((REPOSITORY / "docs" / "reference").rglob("*.md")), *REPOSITORY.glob("data/models/*/README.md")]
README = (REPOSITORY / "README.md").read_text()
DOCS = REPOSITORY / "docs"
RECORDS = REPOSITORY / "benchmarks" / "results"
CROSSCODER = REPOSITORY / "crosscoder-model-diff"
"""Commands and paths may be given from here as well: the pages tell the reader to change into it."""
PACKAGES = {
    **dict.fromkeys(("finqa", "preprocessing", "study", "mini", "benchmarks"), REPOSITORY),
    "crosscoder": CROSSCODER,
}
SOURCES = ("finqa", "preprocessing", "crosscoder-model-diff", "study", "mini", "benchmarks", "tests", "docs")
MADE_BY_RUNS = re.compile(r"data/|results/|crosscoder-model-diff/results/|D/|R/")
CODE_FILE = re.compile(r"(?<![\w./<>*-])[\w./-]+\.(?:py|ipynb|toml|cff|lock)\b")
SOURCE_FILE = re.compile(rf"(?<![\w./<>*-])(?:{'|'.join(SOURCES)})/[\w./-]*\.\w+")
FOLDER = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/)`")
TORCHRUNS = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf"}
RAYS = {"--head", "--port", "--address"}
OTHER_FLAGS = {"--help", "--to", "--execute", "--extra", "--no-sync", "--local-addr"} | TORCHRUNS | RAYS
"""Of every script; of torchrun, nbconvert and uv."""
MODULE = re.compile(rf"\b(?:{'|'.join(PACKAGES)})(?:\.\w+)+")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def tree() -> list[Path]:
    """The files and folders of the packages and pages, and of the root."""
    below = [path for name in SOURCES for path in (REPOSITORY / name).rglob("*") if "__pycache__" not in path.parts]
    return [*REPOSITORY.iterdir(), *below]


def exists(path: str) -> bool:
    return (REPOSITORY / path).exists() or (CROSSCODER / path).exists()


def module_file(dotted: str) -> Path | None:
    """The file of a module or of a package's `__main__`; None where there is none."""
    path = PACKAGES[dotted.partition(".")[0]] / dotted.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__main__.py") if file.exists()), None)


def defined(dotted: str) -> bool:
    """Whether `dotted` is a package, a module, or a name that a module defines at its top level."""
    if module_file(dotted) or (PACKAGES[dotted.partition(".")[0]] / dotted.replace(".", "/")).is_dir():
        return True
    module, _, name = dotted.rpartition(".")
    file = module_file(module) if "." in module else None
    return bool(file and re.search(rf"^(?:def|class) {name}\b|^{name}\b.* =", file.read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", [*PAGES, *GENERATED], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?://)([^)#\s]*)(#[^)\s]*)?\)", page.read_text())
    missing = [target for target, _ in targets if target and not (page.parent / target).exists()]
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert not missing
    assert all(anchor[1:] in headings for target, anchor in targets if anchor and not target)


@every_page
def test_every_file_that_is_named_is_in_the_tree(page: Path, tree: list[Path]):
    names = {path.name for path in tree}
    text = page.read_text()
    named = {*CODE_FILE.findall(text), *SOURCE_FILE.findall(text)}
    named = {name for name in named if not MADE_BY_RUNS.match(name) and not name.startswith("reference/")}
    assert not [name for name in named if not exists(name) and ("/" in name or name not in names)]


@every_page
def test_every_folder_that_is_named_is_in_the_tree(page: Path):
    named = {name for name in FOLDER.findall(page.read_text()) if not MADE_BY_RUNS.match(name)}
    assert not [name for name in named if not exists(name)]


@every_page
def test_every_module_that_is_named_can_be_run_or_imported(page: Path):
    text = page.read_text()
    run = {name for name in re.findall(r"python -m ([\w.]+\w)", text) if name.partition(".")[0] in PACKAGES}
    assert not [name for name in run if not module_file(name)]
    mentioned = {name for name in MODULE.findall(text) if name not in run and not re.search(r"\.(py|md|json)$", name)}
    assert not [name for name in mentioned if not defined(name)]


@pytest.fixture(scope="module")
def flags(tree: list[Path]) -> set[str]:
    """Every flag of a script: written out in its source, or made from a config and shown by --help."""
    scripts = [path for path in tree if path.suffix == ".py" and "tests" not in path.parts]
    found = {flag for path in scripts for flag in re.findall(r'"(--[\w-]+)"', path.read_text())}
    stages = ("preprocess_finqa", "process_finqa_code_generation", "filter_valid_answers")
    commands = [[REPOSITORY / name] for name in ("main.py", "inference.py")]
    commands += [[path] for path in CROSSCODER.glob("*.py")]
    commands += [["-m", f"preprocessing.{stage}"] for stage in stages]
    for command in commands:
        text = subprocess.run(
            [sys.executable, *command, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        found |= set(re.findall(r"--[A-Za-z][\w-]+", text[text.index("\noptions:") :]))
    return found | {flag.replace("--", "--no-", 1) for flag in found}


@every_page
def test_every_flag_that_is_named_is_one_of_a_script(page: Path, flags: set[str]):
    named = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]+", page.read_text()))
    assert not named - flags - OTHER_FLAGS


def test_what_is_not_there_is_noticed():
    assert (
        not exists("finqa/training.py") and not defined("finqa.training.nothing") and not module_file("finqa.nothing")
    )
    assert CODE_FILE.findall("see `finqa/tuning/a.py` and b.py") == ["finqa/tuning/a.py", "b.py"]
    assert FOLDER.findall("`finqa/tuning/` beside `<name>/`") == ["finqa/tuning/"]


def test_the_picture_of_the_tree_has_every_package_and_nothing_else(tree: list[Path]):
    [picture] = re.findall(r"^```\n(main\.py  .*?)^```", README, re.DOTALL | re.MULTILINE)
    drawn, above = set[str](), list[str]()
    for line in picture.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0]]
        drawn.add("".join(above))
    assert not [path for path in drawn if not (REPOSITORY / path).exists()]
    packages = {f"{path.parent.relative_to(REPOSITORY)}/" for path in tree if path.name == "__init__.py"}
    assert {package for package in packages if not package.startswith("tests/")} <= drawn


# --- Figures of README.md ---------------------------------------------------------------------------------------------


def cells(row: str, text: str = README) -> list[str]:
    """The cells of the one line of a table that begins with `row`."""
    [line] = [line for line in text.splitlines() if line.startswith(row)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_accuracy_with_an_interval_stands_in_the_page_behind_it():
    behind = (DOCS / "finqa.md").read_text() + (DOCS / "reference" / "finqa-mini" / "README.md").read_text()
    shown = re.findall(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", README)
    assert len(shown) == 18
    assert not [figure for figure in shown if figure not in behind]


def test_what_a_card_holds_is_in_the_records():
    behind = " ".join((DOCS / "reproduce.md").read_text().split())
    table = README.partition("## What a card of")[2].partition("## ")[0]
    seconds = json.loads((RECORDS / "diff.json").read_text())["seconds"]
    of_diff = " + ".join(f"{seconds[stage]:.0f}" for stage in ("collect", "train", "analyse")) + " s"
    for shown, told in (
        ("19.7 GB with `--gradient-checkpointing yes`", "| 19.7 | `benchmarks/results/lora_7b_24gb.json`"),
        ("19.0 GB with the base in 4 bits", "| 19.0 | the same |"),
        ("31.8 GB with the default settings", "| 31.8 GB GPU"),
        ("23.0 min at the speed of an H200", "23.0 min at the H200's speed"),
        ("12.3 min on an H100", "12.3 min on an H100"),
        ("14.5 GB of weights, 1.7 of adapter, 1.1 for keys", "14.5 GB of weights, 1.7 of adapter and 1.1 for"),
        (
            "42 s by the base, 97 s with the adapter, after 96 and 103 s",
            "42 s for 1,104 prompts by the base, 97 s with",
        ),
        (of_diff, f"{of_diff} at the H200's speed"),
        ("19.2 GB", "activations 19.2 GB of disk"),
    ):
        assert shown in table and told in behind, shown
    steps = json.loads((RECORDS / "crosscoder_step.json").read_text())["steps"]
    for latents, words in (("16384", "{} GB for 16,384 latents"), ("65536", "{} GB for 65,536"),
                           ("131072", "{} GB for 131,072 latents")):  # fmt: skip
        assert words.format(steps[latents]["by hand"]["peak_gb"]) in table


def test_the_two_speeds_are_those_of_their_records():
    prose = " ".join(README.split())
    total = json.loads((RECORDS / "diff.json").read_text())["total_s"]
    step = json.loads((RECORDS / "crosscoder_step_h200.json").read_text())["steps"]["16384"]
    by_hand, autograd, plain = (step[way]["ms"] for way in ("by hand", "autograd, bf16", "autograd, fp32"))
    assert f"takes {total:.0f} s" in prose
    assert f"takes {by_hand:.1f} ms" in prose and f"dense step alone take {step['floor']['both']:.1f}, " in prose
    assert f"autograd's step {autograd:.1f} ms, and plain fp32 {plain:.0f} ms" in prose


def test_what_is_said_of_libraries_and_patches_is_that_of_the_records():
    prose = " ".join((REPOSITORY / "docs" / "reproduce.md").read_text().split())
    variants = json.loads((RECORDS / "lora_libraries_8_rows.json").read_text())["variants"]
    plain, liger, packed, own, torchao = (
        f"{variants[f'8 rows, {name}']['ms_a_step']:.0f} ms"
        for name in ("plain", "liger", "packed, liger", "+ fp8 base", "+ torchao fp8 base")
    )
    assert f"as it comes takes {plain} an update, with liger-kernel {liger}, {packed} on packed rows" in prose
    assert f"in compiled layers takes {torchao}, `--fp8-base` {own}" in prose
    last = (RECORDS / "lora_libraries_losses.md").read_text().split("| apart")[1]
    for name, place in (("`--fp8-base`", 3), ("torchao", 4)):
        assert f"{last.split('|')[place].split('/')[1].strip()}" in prose and name in prose
    causal = json.loads((RECORDS / "causal_1_5b.json").read_text())
    ours, whole = (causal["ways"][way]["value"] for way in ("teacher-forced", "teacher-forced, whole models"))
    tokens = f"{causal['tokens'] / causal['documents']:,.0f} tokens"
    assert f"{ours:.1f} ms a document ({tokens}) and patch on an H200, {whole:.1f} by whole models" in prose
