"""The activations of the study's pairs: every pair over the same documents, prompt and program of every test row."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscoder.activations.readers import Target
from crosscoder.names import ActivationChoice
from finqa.runtime.commands import CROSSCODER_FOLDER, last_line
from study.pocket.models import student_of
from study.pocket.plan import DATASET, STUDENT, Model, Pair
from study.work import Work, in_parallel, run


def choice_of(work: Work, pair: Pair, target: Target) -> ActivationChoice:
    """The activation set of a pair at a site."""
    base = pair.instruct.run_name is None
    return ActivationChoice(
        student=student_of(pair.fine_tuned),
        num_samples=work.plan.documents,
        layer=target.layer,
        site=target.site,
        against=None if base else pair.instruct.run_name,
    )


def activations(work: Work, pair: Pair, target: Target) -> Path:
    """Folder of that set."""
    return work.folders.activations(choice_of(work, pair, target).name)


@dataclass(frozen=True)
class Recording:
    """A pair at a site."""

    pair: Pair
    target: Target

    @property
    def name(self) -> str:
        return f"{self.pair.name}, {site_name(self.target)}"


def collect_all(work: Work, wanted: Sequence[Recording]) -> None:
    """Record the activations that are not there."""
    missing = [one for one in wanted if not (activations(work, one.pair, one.target) / "config.json").exists()]
    in_parallel(work, "activations", collect, missing, lambda found: found["shown"])


def collect(work: Work, one: Recording) -> dict[str, Any]:
    started, pair, target = time.perf_counter(), one.pair, one.target
    choice = choice_of(work, pair, target)
    words = [f"collect_activations.py {DATASET} {STUDENT} --num-samples {choice.num_samples} --no-push"]
    words += [f"--layer {target.layer} --site {target.site}", *_run_name(pair.fine_tuned)]
    words += [f"--against '{choice.against}'"] if choice.against is not None else []
    words += ["--allow-identical"] if pair.identical else []
    words.append(f"--data-dir {shlex.quote(str(work.folders.data))}")
    log = run(work, f"activations {one.name}", " ".join(words), CROSSCODER_FOLDER)
    return {"shown": last_line(log).partition(", scales")[0], "seconds": time.perf_counter() - started}


def _run_name(model: Model) -> list[str]:
    return [f"--run-name {model.run_name}"] if model.run_name else []


def site_name(target: Target) -> str:
    """As it stands in tables."""
    return f"layer {target.layer} {target.site}"
