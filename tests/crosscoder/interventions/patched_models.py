"""A pair of small random models whose difference at one site is known, and dictionaries that are built to hold it.

The fine-tuned model is the instruct model with another MLP in its second layer, which adds a fixed vector times how
much of a direction there is in what it reads. So the difference of the MLP's outputs is one direction, and a
dictionary with one latent can carry exactly that.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.dictionaries.config import CrosscoderConfig
from crosscoder.dictionaries.methods import new_dictionary
from crosscoder.dictionaries.model import BatchTopKCrosscoder
from crosscoder.interventions.causal_rows import Asked

WIDTH, SITE = 32, Target(2, "mlp")
SCALES = (0.5, 1.25)


class WithMore(nn.Module):
    """An MLP that also adds `direction` times the size of its input along `reads`, both [d_model]."""

    def __init__(self, mlp: nn.Module, reads: Tensor, direction: Tensor):
        super().__init__()
        self.mlp = mlp
        self.reads, self.direction = nn.Parameter(reads), nn.Parameter(direction)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + (1 + (x @ self.reads).abs())[..., None] * self.direction


def small_model(vocabulary: int = 40) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=None, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def planted_pair(vocabulary: int = 40) -> tuple[Any, Any, Tensor]:
    """Instruct model, fine-tuned model, and the direction [d_model] of their difference at SITE."""
    instruct = small_model(vocabulary)
    fine_tuned = copy.deepcopy(instruct)
    torch.manual_seed(3)
    reads, direction = torch.randn(WIDTH) / WIDTH**0.5, 2 * torch.randn(WIDTH)
    fine_tuned.model.layers[1].mlp = WithMore(fine_tuned.model.layers[1].mlp, reads, direction)
    return instruct, fine_tuned, direction


def planted_crosscoder(direction: Tensor, n_latents: int = 6) -> BatchTopKCrosscoder:
    """Latent 0 reads and writes the difference along the direction; the others fire and write the same into both.

    Raw activations are scaled by SCALES, so a patch that forgets to undo them is wrong.
    """
    dictionary = new_dictionary(CrosscoderConfig(WIDTH, n_latents, 1), generator=torch.Generator().manual_seed(1))
    dictionary.activation_scales = SCALES
    unit = direction / direction.norm()
    scales = torch.tensor(SCALES)[:, None]
    with torch.no_grad():
        dictionary.W_dec[0] = torch.stack([-unit / 2, unit / 2]) * scales
        dictionary.W_dec[1:] = dictionary.W_dec[1:, :1] * scales
        # What enters is raw times the scale.
        dictionary.W_enc[:, :, 0] = torch.stack([-unit, unit]) / scales
        dictionary.W_enc[:, :, 1:] = dictionary.W_dec[1:].permute(1, 2, 0)
    dictionary.threshold = 1e-6
    return dictionary.requires_grad_(False)


def planted_sae(direction: Tensor) -> BatchTopKCrosscoder:
    """A difference SAE whose only latent is the direction."""
    dictionary = new_dictionary(CrosscoderConfig(WIDTH, 1, 1, method="difference-sae"))
    dictionary.activation_scales, dictionary.threshold = (3.0,), 1e-6
    unit = direction / direction.norm()
    with torch.no_grad():
        dictionary.W_dec[0, 0] = unit
        dictionary.W_enc[0, :, 0] = unit
    return dictionary.requires_grad_(False)


def documents_written_by(model: Any, n: int, first: int = 0, n_new: int = 5) -> list[Document]:
    """Prompts of different lengths, and what the model says best after them."""
    made = []
    for number in range(first, first + n):
        ids = [1, *(3 + (number * 5 + j * (number + 1)) % 30 for j in range(6 + number % 7))]
        n_prompt = len(ids)
        for _ in range(n_new):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        made.append(Document(f"d{number}", tuple(ids), n_prompt))
    return made


def asked_about(documents: list[Document]) -> list[Asked]:
    """Half of them of a new family."""
    return [
        Asked(document, ("difference", "ratio")[number % 2], ("known", "new")[number % 2], "1")
        for number, document in enumerate(documents)
    ]
