"""One pass over an activation set: every firing of some latents, and every latent's histogram."""

from __future__ import annotations

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import READ_TOKENS
from crosscoder.dictionaries.model import BatchTopKCrosscoder

Firings = tuple[Tensor, Tensor]
"""Of one latent, on the CPU: [firing] int32 token indices of the set, ascending, and [firing] fp32 values."""


@torch.no_grad()
def gather_firings(
    model: BatchTopKCrosscoder,
    store: ActivationStore,
    latents: Tensor,
    largest: Tensor,
    n_bins: int,
    batch_size: int = READ_TOKENS,
) -> tuple[list[Firings], Tensor]:
    """Run the whole set through the encoder once.

    Args:
        latents: [n] numbers of the latents whose firings are kept.
        largest: [latent] every latent's largest activation, the end of its histogram.
        n_bins: Of a histogram, which starts at 0.

    Returns every firing of `latents` at the inference threshold, latent by latent, and [latent, n_bins] int64
    histograms of every latent. Memory grows with the firings of `latents` (12 bytes each, three times that while they
    are put in order), not with the size of the set.
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
    counts = torch.bincount(owner, minlength=len(latents)).tolist()
    by_latent = (torch.cat(parts)[order].split(counts) for parts in (tokens, values))
    return list(zip(*by_latent, strict=True)), histograms.view(n_latents, n_bins).cpu()


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
