"""Questions of five made-up families, and the activations of two models that read them.

Every question has 12 tokens: three of passage, one before the cue, one after it, the last of the prompt, three
look-ups, an operator, two more. From the cue on, a direction of the question's own family is written: into both models
for a known family, into the fine-tuned one alone for an added family. Other directions come and go at random in both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from made_up_activations import write_store
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from study.measures.strata import STRATA, Questions, Stratum

FAMILIES = ("change", "highest", "lowest", "mean", "ratio")
ADDED = (False, False, False, True, True)
TEMPLATE = (0, 1, 1, 1, 0)
"""A template has known families and an added one."""
N_QUESTIONS, D_MODEL, N_OTHER = 200, 24, 12
LAYOUT: tuple[Stratum, ...] = (
    *("passage",) * 3,
    "question before the cue",
    "question after the cue",
    "last prompt token",
    *("program before the operator",) * 3,
    "operator",
    *("rest",) * 2,
)
CUE = LAYOUT.index("question after the cue")
SIZE = 2.0
"""Length of what a family's direction adds."""


def directions() -> Tensor:
    """[families and others, d_model]: orthonormal."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(D_MODEL, D_MODEL, generator=generator)
    return torch.linalg.qr(drawn).Q[: len(FAMILIES) + N_OTHER]


def made_up_questions(per_page: int = 1, seed: int = 0, n: int = N_QUESTIONS) -> Questions:
    """Families equally often, in a random order; `per_page` questions in a row are of one page."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    family = order % len(FAMILIES)
    return Questions(
        ids=tuple(f"row-{i}" for i in range(n)),
        families=FAMILIES,
        family=family,
        added=torch.tensor(ADDED),
        template=torch.tensor(TEMPLATE)[family],
        page=torch.arange(n) // per_page,
        stratum=torch.tensor([STRATA.index(s) for s in LAYOUT]).repeat(n),
        document=torch.arange(n).repeat_interleave(len(LAYOUT)),
    )


def made_up_store(folder: Path, questions: Questions, identical: bool = False, noise: float = 0.02) -> ActivationStore:
    """What the two models make of them; `identical`: the fine-tuned model twice."""
    generator = torch.Generator().manual_seed(5)
    along = directions()
    n_tokens = len(questions.document)
    told = torch.arange(len(LAYOUT)).repeat(len(questions)) >= CUE
    of_family = torch.nn.functional.one_hot(questions.family[questions.document], len(FAMILIES)) * told[:, None] * SIZE
    of_others = (torch.rand(n_tokens, N_OTHER, generator=generator) < 0.2) * SIZE
    strength = torch.ones(2, len(FAMILIES))
    strength[0, questions.added] = 0
    models = [torch.cat([of_family * strength[m], of_others], dim=1) @ along for m in range(2)]
    activations = torch.stack([models[1] if identical else models[0], models[1]], dim=1)
    spread = noise * torch.randn(n_tokens, 2, D_MODEL, generator=generator)
    activations = activations + (spread[:, :1] if identical else spread)
    write_store(folder, activations, document_tokens=len(LAYOUT))  # half of a document is prompt
    return ActivationStore(folder)


def perfect_crosscoder() -> BatchTopKCrosscoder:
    """A latent for each direction, that reads and writes it in the models that have it."""
    along = directions()
    n = len(along)
    model = new_dictionary(CrosscoderConfig(D_MODEL, n, 3))
    share = torch.full((2, n), 0.5)
    new = torch.tensor(ADDED).nonzero().squeeze(-1)
    share[0, new], share[1, new] = 0.0, 1.0
    model.W_enc.data = along.T[None] * share[:, None]
    model.W_dec.data = along[:, None] * (share > 0).T[:, :, None]
    model.threshold = 0.5
    return model


def perfect_difference_sae() -> BatchTopKCrosscoder:
    """A latent for each direction; those of what both models have are silent but for noise."""
    along = directions()
    model = new_dictionary(CrosscoderConfig(D_MODEL, len(along), 1, method="difference-sae"))
    model.W_enc.data, model.W_dec.data = along.T[None].clone(), along[:, None].clone()
    model.threshold = 0.5
    return model
