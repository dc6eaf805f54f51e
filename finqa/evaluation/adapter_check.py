"""Is the adapter active, and is what vLLM serves the model that was trained?

An adapter can be lost without an error: by a name that matches no layer, by an engine that ignores it, by rounding when
it is merged. So the base, the base with its adapter (unmerged), the merged model and the engine that evaluates all read
a few questions with the fine-tuned model's own replies, and their next-token distributions are compared at every token
of the replies:

- the adapter is active where KL(adapter | base) is above 0;
- merged model and engine agree with it where their mean KL from it is at most AGREEMENT of that.

vLLM gives the log-probabilities of the likeliest tokens, not of all. So there the KL is taken over those tokens and one
class of all others, for the engine and for the base alike: both are lower bounds of the whole KL, on the same classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finqa.evaluation.engines.serving import Served, served_models
from finqa.evaluation.predictions import read_predictions
from finqa.evaluation.rows import read_rows
from finqa.models import fidelity, merging
from finqa.models.adapters import is_adapter
from finqa.models.fidelity import AGREEMENT, Sequences
from finqa.models.students import StudentRun, find_adapter, prompt_ids, quiet_libraries, tokenizer_of
from finqa.runtime.errors import UserError
from finqa.runtime.manifest import write_json
from finqa.runtime.paths import Folders
from finqa.task import datasets, prompts

if TYPE_CHECKING:
    from torch import Tensor

    from finqa.evaluation.evaluate import EvaluationConfig

ROUNDING = 0.005
"""Nats a token that two ways to compute one model in 16 bits can be apart: 0.0017 was measured on a CPU."""
QUESTIONS = 8
LONGEST_REPLY = 128
"""Tokens of a reply that are read."""


@dataclass(frozen=True)
class EngineReading:
    """Log-probabilities that a vLLM engine gives to some sequences."""

    logprobs: list[list[dict[int, float]]]
    adapter: str
    """How the engine got the adapter: merged, or by request."""


def check_adapter(
    run: StudentRun, config: EvaluationConfig, folders: Folders, reading: EngineReading | None = None
) -> None:
    """Check the fine-tuned student that was just evaluated, and add the result to the run.json of each split.

    `reading` is what the engine said that evaluated (`engine_reading`); with vLLM and without it one is started again.
    Says the result in one line. Raises UserError where the adapter changes nothing, or where there is no evaluation
    of it.
    """
    student = find_adapter(run, folders)
    if not is_adapter(student):
        print("no check of the adapter: the student is a whole model", flush=True)
        return
    manifests = [
        path for split in config.splits if (path := _folder(run, config, folders, split) / "run.json").exists()
    ]
    if not manifests:
        print("no check of the adapter: the fine-tuned model was not evaluated (--eval-type)", flush=True)
        return
    sequences = own_replies(run, config, folders, config.splits[0])
    found = compare(run, student, sequences, config, reading)
    for path in manifests:
        write_json(path, json.loads(path.read_text()) | {"adapter_check": found})
    print(verdict(found), flush=True)
    if not found["active"]:
        raise UserError(f"the adapter in {student} changes nothing: base and fine-tuned model are the same")


def _folder(run: StudentRun, config: EvaluationConfig, folders: Folders, split: str) -> Path:
    return folders.evaluation(run.dataset, run.model_id, split, "fine-tuned" + config.generation.folder_suffix)


def engine_reading(run: StudentRun, config: EvaluationConfig, folders: Folders, served: Served) -> EngineReading | None:
    """What the engine says of the fine-tuned model's own replies, asked while it still runs: a start takes minutes.

    None where it gives no log-probabilities or has no adapter.
    """
    how = served.facts["adapter"]
    if served.logprobs is None or how == "none":
        return None
    return EngineReading(served.logprobs(own_replies(run, config, folders, config.splits[0])), how)


def own_replies(run: StudentRun, config: EvaluationConfig, folders: Folders, split: str) -> Sequences:
    """The first questions of a split that the fine-tuned model replied to, each with its reply."""
    tokenizer = tokenizer_of(run, folders.model(run.dataset, run.model_id))
    prompt_of = {row.id: row.prompt for row in read_rows(folders, datasets.dataset(run.dataset), split)[1]}
    sequences = []
    for row in read_predictions(_folder(run, config, folders, split)):
        reply: Any = tokenizer(row.reply, add_special_tokens=False)["input_ids"]
        if reply and row.id in prompt_of and len(sequences) < QUESTIONS:
            prompt = prompt_ids(tokenizer, prompts.messages(prompt_of[row.id], "fine-tuned"))
            sequences.append(([*prompt, *reply[:LONGEST_REPLY]], len(prompt)))
    if not sequences:
        raise UserError(f"the adapter cannot be checked: no reply in {_folder(run, config, folders, split)}")
    return sequences


def compare(
    run: StudentRun,
    student: Path,
    sequences: Sequences,
    config: EvaluationConfig,
    reading: EngineReading | None = None,
) -> dict[str, Any]:
    """Mean KL (nats a token) from the base with its adapter to the base, the merged model, and vLLM where it serves.

    Keys: `questions`, `tokens`, `kl_base`, `kl_merged`, `share_merged` (of kl_base), `same_first` (share of tokens
    whose likeliest successor the adapter leaves as it is), with vLLM `kl_vllm`, `kl_base_on_vllm_tokens`, `share_vllm`,
    `vllm_adapter`; `active`, `agrees`.
    """
    quiet_libraries()
    if config.generation.vllm and reading is None:
        reading = _by_an_engine(run, student, sequences, config)
    base, adapted = fidelity.unmerged(run, student, sequences)
    kl_base = fidelity.mean_kl(adapted, base)
    found: dict[str, Any] = {"questions": len(sequences), "tokens": sum(map(len, adapted)), "kl_base": kl_base}
    found["same_first"] = fidelity.same_first(adapted, base)
    agree = []
    if not run.load_in_4bit:  # a merged model is not 4-bit: nothing serves it so
        try:
            with merging.merged(run.model, student, run.revision) as folder:
                found["kl_merged"] = fidelity.mean_kl(adapted, fidelity.whole_model(folder, sequences))
        except UserError as error:  # there is no room for it
            print(f"the merged model is not checked: {error}", flush=True)
        else:
            found["share_merged"] = _share(found["kl_merged"], kl_base)
            agree.append(fidelity.agrees(found["kl_merged"], kl_base))
    if reading is not None:
        served = reading.logprobs
        found["kl_vllm"] = fidelity.mean(map(kl_on_classes, adapted, served))
        on_classes = [classes_of(one, classes) for one, classes in zip(base, served, strict=True)]
        found["kl_base_on_vllm_tokens"] = fidelity.mean(map(kl_on_classes, adapted, on_classes))
        found["share_vllm"] = _share(found["kl_vllm"], found["kl_base_on_vllm_tokens"])
        found["vllm_adapter"] = reading.adapter
        agree.append(fidelity.agrees(found["kl_vllm"], found["kl_base_on_vllm_tokens"]))
    return found | {"active": kl_base > 0, "agrees": all(agree)}


def verdict(found: dict[str, Any]) -> str:
    """The result in one line."""
    shares = {"merged": found.get("share_merged"), "vLLM": found.get("share_vllm")}
    parts = [f"KL {found['kl_base']:.3g} nats a token from the base"]
    parts += [f"{name} within {100 * share:.2g}% of that" for name, share in shares.items() if share is not None]
    state = "active" if found["active"] else "NOT active"
    doubt = ""
    if not found["agrees"]:
        doubt = f": more than the {AGREEMENT:.0%} that rounding explains, do not trust it"
        if 0 < max(found.get("kl_merged", 0), found.get("kl_vllm", 0)) < ROUNDING:
            doubt = f": rounding is over {AGREEMENT:.0%} of so small a change, which tells nothing; train for longer"
    return f"adapter {state}: {', '.join(parts)}{doubt}"


def kl_on_classes(p: Tensor, q: Sequence[dict[int, float]]) -> Tensor:
    """KL(p | q) over the tokens that q names and one class of all others; p [tokens, vocabulary], result [tokens]."""
    import torch

    result = []
    for log_p, classes in zip(p.double(), q, strict=True):
        log_q = torch.tensor(list(classes.values()), dtype=torch.float64)
        named = log_p[list(classes)]
        rest_p, rest_q = ((1 - named.exp().sum()).clamp(min=1e-12), (1 - log_q.exp().sum()).clamp(min=1e-12))
        result.append((named.exp() * (named - log_q)).sum() + rest_p * (rest_p.log() - rest_q.log()))
    return torch.stack(result)


def classes_of(p: Tensor, like: Sequence[dict[int, float]]) -> list[dict[int, float]]:
    """What p [tokens, vocabulary] says of the tokens that `like` names at each place."""
    return [{token: float(row[token]) for token in classes} for row, classes in zip(p, like, strict=True)]


def _by_an_engine(run: StudentRun, student: Path, sequences: Sequences, config: EvaluationConfig) -> EngineReading:
    """What one engine says that is started for it (several give no log-probabilities)."""
    one_engine = replace(config.generation, data_parallel=1)
    with closing(served_models(run, student, ["fine-tuned"], one_engine)) as models:
        model = next(models)
        assert model.logprobs
        return EngineReading(model.logprobs(sequences), model.facts["adapter"])


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
