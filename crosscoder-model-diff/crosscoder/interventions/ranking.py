"""Which latents first: what the sets of the causal figure are taken from.

    effect        an estimate of the indirect effect: how much adding the latent's f_j D_j to the instruct model should
                  lower KL(fine-tuned || patched), to first order in the site's activation (attribution patching), all
                  positions that a patch changes, summed over documents. One backward pass a batch serves every latent
    exclusivity   1 - nu_err with the fine-tuned decoder vector as the probe; the latents whose slopes cannot be trusted
                  (analysis.latent_scaling) come after the others

Rank on other documents than those that the sets are scored on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.activations.collection import Document
from crosscoder.activations.readers import Target
from crosscoder.analysis.latent_scaling import LatentScaling
from crosscoder.dictionaries.model import BatchTopKCrosscoder, products_of
from crosscoder.interventions.halves import Pair, after_patch
from crosscoder.interventions.patching import Halves, batches, run_halves
from crosscoder.interventions.sets import Reading, difference_parts
from finqa.runtime.progress import Progress


@dataclass(frozen=True)
class Survey:
    """What a dictionary and the difference of the models do at a site over some documents; on the CPU, fp64."""

    n_tokens: int
    frequency: Tensor
    """[latent]: share of tokens on which it is active, in a stagewise SAE before or after."""
    injected: Tensor
    """[latent]: root mean square over all tokens of the length of what it adds, |f_j D_j|, in the models' own units."""
    effect: Tensor
    """[latent]: nats that adding it should take off the KL, summed over tokens; positive brings the models together."""
    mean_difference: Tensor
    """[d_model]: of fine-tuned less instruct."""
    moments: Tensor
    """[d_model, d_model]: mean outer product of the difference, uncentred."""

    def components(self, n: int) -> Tensor:
        """[n, d_model]: the directions in which the difference is largest, largest first."""
        return torch.linalg.eigh(self.moments).eigenvectors.flip(-1)[:, :n].T.contiguous()

    @property
    def alive(self) -> list[int]:
        return self.frequency.nonzero().squeeze(-1).tolist()


def survey(
    dictionary: BatchTopKCrosscoder,
    pair: Pair,
    documents: Sequence[Document],
    target: Target,
) -> Survey:
    """One pass of both models over the documents, and one backward pass of the layers above the site."""
    device, n_latents = pair.instruct.device, dictionary.config.n_latents
    firings, effect = (torch.zeros(n_latents, dtype=torch.float64, device=device) for _ in range(2))
    products = torch.zeros((), dtype=torch.float64, device=device)
    width = dictionary.config.d_model
    total = torch.zeros(width, dtype=torch.float64, device=device)
    moments = torch.zeros(width, width, dtype=torch.float64, device=device)
    vectors = difference_parts(dictionary)
    n_tokens = 0
    total_ids = sum(len(document.ids) for document in documents)
    progress = Progress(f"ranking latents on {len(documents)} documents, tokens", total_ids)
    for _, batch in batches(documents, device):
        halves = run_halves(pair, batch, [target.layer])
        reading = reading_of(halves, target)
        f = reading.parts(dictionary).float()
        towards = f * torch.einsum("td,pjd->tpj", divergence_gradient(pair, halves, target).float(), vectors)
        n_tokens += len(f)
        firings += (f > 0).any(dim=1).sum(dim=0)
        products = products + products_of(f.double())
        effect -= towards.sum(dim=(0, 1), dtype=torch.float64)
        difference = reading.difference.double()
        total += difference.sum(dim=0)
        moments += difference.T @ difference
        progress.advance(int(batch.length.sum()))
    progress.close()
    return Survey(
        n_tokens=n_tokens,
        frequency=(firings / n_tokens).cpu(),
        injected=dictionary.written_squares(products / n_tokens).sqrt().cpu(),
        effect=effect.cpu(),
        mean_difference=(total / n_tokens).cpu(),
        moments=(moments / n_tokens).cpu(),
    )


def reading_of(halves: Halves, target: Target) -> Reading:
    """Reading of every token that a patch may change, document after document."""
    at = halves.batch.patched_at
    sites = [records[target.layer].site(target).flatten(0, 1)[at] for records in halves.records]
    return Reading(torch.stack(sites, dim=1))


def divergence_gradient(pair: Pair, halves: Halves, target: Target) -> Tensor:
    """[tokens, d_model]: of the summed KL(fine-tuned || instruct) by the instruct model's site, at patchable tokens."""
    record = halves.records[0][target.layer]
    site = record.site(target).detach().requires_grad_()
    with torch.enable_grad():
        hidden = after_patch(pair.instruct, pair.instruct, record, target, site, halves.frame, halves.ends)
        ours = pair.instruct.logits(hidden).log_softmax(-1)
        # Of the cross-entropy, which differs from the KL by a constant.
        (gradient,) = torch.autograd.grad(-(halves.reference.softmax(-1) * ours).sum(), site)
    return gradient[halves.batch.patched]


def by_effect(found: Survey) -> list[int]:
    """Alive latents, the most helpful first."""
    return _descending(found.effect, found.alive)


def by_exclusivity(scaling: LatentScaling, found: Survey) -> list[int]:
    """Alive latents by 1 - nu_err of the fine-tuned probe; those without a slope to trust last."""
    return _descending(torch.where(scaling.trusted, 1 - scaling.nu_err[:, 1], -torch.inf), found.alive)


def _descending(scores: Tensor, among: Sequence[int]) -> list[int]:
    """Latents in descending order of their scores, of equal ones the lower number first."""
    values = scores.tolist()
    return sorted(among, key=lambda latent: (-values[latent], latent))
