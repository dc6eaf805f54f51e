"""One pass over an activation set: every firing of some latents, and every latent's histogram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import READ_TOKENS
from crosscoder.dictionaries.model import BatchTopKCrosscoder


@dataclass(frozen=True)
class Firings:
    """Every firing of some latents at the inference threshold, by latent, then in the order of the set. On the CPU."""

    latents: Tensor
    """[n] the latents' numbers."""
    starts: Tensor
    """[n + 1] where each latent's firings begin."""
    tokens: Tensor
    """[firing] int32: token indices of the set."""
    values: Tensor
    """[firing] fp32."""

    def of(self, i: int) -> tuple[Tensor, Tensor]:
        """Tokens and values of the i-th latent."""
        span = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return self.tokens[span], self.values[span]


@torch.no_grad()
def gather_firings(
    model: BatchTopKCrosscoder,
    store: ActivationStore,
    latents: Tensor,
    largest: Tensor,
    n_bins: int,
    batch_size: int = READ_TOKENS,
) -> tuple[Firings, Tensor]:
    """Run the whole set through the encoder once.

    Args:
        latents: [n] numbers of the latents whose firings are kept.
        largest: [latent] every latent's largest activation, the end of its histogram.
        n_bins: Of a histogram, which starts at 0.

    Returns the firings, and [latent, n_bins] int64 histograms of every latent. Memory grows with the firings of
    `latents` (12 bytes each, three times that while they are put in order), not with the size of the set.
    """
    device, n_latents = model.b_dec.device, model.config.n_latents
    place = torch.full((n_latents,), -1, dtype=torch.int64, device=device)
    place[latents.to(device)] = torch.arange(len(latents), device=device)
    ends = largest.to(device, torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
    histograms = torch.zeros(n_latents * n_bins, dtype=torch.int64, device=device)
    owners, tokens, values = ([torch.empty(0, dtype=kind)] for kind in (torch.int32, torch.int32, torch.float32))
    for indices, raw in store.batches(torch.arange(len(store)), batch_size, "examples, tokens"):
        f = model.encode(model.scale(raw.to(device)))
        row, latent = f.nonzero(as_tuple=True)
        value = f[row, latent].float()
        # What was the largest in another batch can be a rounding larger here.
        bins = (value / ends[latent] * n_bins).clamp(0, n_bins - 1).long()
        histograms += torch.bincount(latent * n_bins + bins, minlength=len(histograms))
        kept = place[latent] >= 0
        owners.append(place[latent][kept].int().cpu())
        tokens.append(indices.to(device)[row][kept].int().cpu())
        values.append(value[kept].cpu())
    owner, order = torch.sort(torch.cat(owners), stable=True)
    counts = torch.bincount(owner, minlength=len(latents))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    firings = Firings(latents.cpu(), starts, torch.cat(tokens)[order], torch.cat(values)[order])
    return firings, histograms.view(n_latents, n_bins).cpu()


def groups_within(latents: Tensor, n_firings: Tensor, limit: int) -> list[Tensor]:
    """Cut [n] latents, in their order, into groups of at most `limit` firings together ([latent] `n_firings`).

    A latent that alone has more is a group of its own. At least one group, which may be empty.
    """
    groups: list[list[int]] = [[]]
    held = 0
    for latent in latents.tolist():
        n = int(n_firings[latent])
        if groups[-1] and held + n > limit:
            groups.append([])
            held = 0
        groups[-1].append(latent)
        held += n
    return [torch.tensor(group, dtype=torch.int64) for group in groups]
