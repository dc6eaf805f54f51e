"""The activations of the study's pairs: every pair over the same documents, prompt and program of every test row."""

from __future__ import annotations

import shlex
from pathlib import Path

from crosscoder.activations.readers import Target
from crosscoder.names import ActivationChoice
from mini.study.models import student_of
from mini.study.plan import DATASET, STUDENT, Model, Pair
from mini.study.work import CROSSCODER_FOLDER, Work, last_line, run, step


def choice_of(work: Work, pair: Pair, target: Target) -> ActivationChoice:
    """The activation set of a pair at a site."""
    base = pair.instruct.run_name is None
    return ActivationChoice(
        student=student_of(pair.fine_tuned),
        num_samples=work.plan.test_questions + work.plan.other_questions,
        layer=target.layer,
        site=target.site,
        against=None if base else pair.instruct.run_name,
    )


def activations(work: Work, pair: Pair, target: Target) -> Path:
    """Folder of that set."""
    return work.folders.activations(choice_of(work, pair, target).name)


def collect(work: Work, pair: Pair, target: Target) -> None:
    """Record a pair's activations, where they are not there."""
    choice = choice_of(work, pair, target)
    if (activations(work, pair, target) / "config.json").exists():
        return
    with step(f"activations: {pair.name}, {site_name(target)}") as say:
        words = [f"collect_activations.py {DATASET} {STUDENT} --num-samples {choice.num_samples} --no-push"]
        words += [f"--layer {target.layer} --site {target.site}", *_run_name(pair.fine_tuned)]
        words += [f"--against '{choice.against}'"] if choice.against is not None else []
        words += ["--allow-identical"] if pair.identical else []
        words.append(f"--data-dir {shlex.quote(str(work.folders.data))}")
        log = run(work, f"activations {pair.name}", " ".join(words), CROSSCODER_FOLDER)
        say(last_line(log).partition(", scales")[0])


def _run_name(model: Model) -> list[str]:
    return [f"--run-name {model.run_name}"] if model.run_name else []


def site_name(target: Target) -> str:
    """As it stands in tables."""
    return f"layer {target.layer} {target.site}"
