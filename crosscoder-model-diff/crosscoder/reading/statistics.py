"""What each latent does on a set of tokens, gathered in one pass at the inference threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crosscoder.activations.store import ActivationStore
from crosscoder.model import BatchTopKCrosscoder


@dataclass(frozen=True)
class LatentStatistics:
    """Per latent, over `n_tokens` tokens; on the CPU."""

    n_tokens: int
    n_firings: Tensor
    """[latent] int64: tokens on which it is active."""
    n_completion_firings: Tensor
    """[latent] int64: of those, tokens of the program."""
    n_positive: Tensor
    """[latent] int64: tokens on which it is positive, whether above the threshold or not."""
    mean_activation: Tensor
    """[latent] fp64: mean value where active; 0 where it never is."""
    top_values: Tensor
    """[latent, n_top]: its largest values, falling; 0 where it has fewer."""
    top_tokens: Tensor
    """[latent, n_top] int64: token indices of those in the store; -1 where it has fewer."""

    @property
    def frequency(self) -> Tensor:
        """[latent] fp64: share of tokens on which it is active."""
        return self.n_firings.double() / self.n_tokens

    @property
    def dead(self) -> Tensor:
        """[latent] mask: active on no token."""
        return self.n_firings == 0


@torch.no_grad()
def latent_statistics(
    model: BatchTopKCrosscoder, store: ActivationStore, indices: Tensor, n_top: int = 20, batch_size: int = 4096
) -> LatentStatistics:
    """Run the tokens at `indices` of the store through the encoder once."""
    device = model.b_dec.device
    n_latents = model.config.n_latents
    completion = store.is_completion()
    counts = {name: torch.zeros(n_latents, dtype=torch.int64, device=device) for name in ("all", "program", "positive")}
    sums = torch.zeros(n_latents, dtype=torch.float64, device=device)
    top_values = torch.zeros(n_latents, 0, device=device)
    top_tokens = torch.zeros(n_latents, 0, dtype=torch.int64, device=device)
    for chunk, raw in store.batches(indices, batch_size):
        values = model.activations(model.scale(raw.to(device)))
        f = model.select_by_threshold(values)
        active = f > 0
        counts["all"] += active.sum(dim=0)
        counts["program"] += active[completion[chunk].to(device)].sum(dim=0)
        counts["positive"] += (values > 0).sum(dim=0)
        sums += f.sum(dim=0, dtype=torch.float64)
        best = torch.topk(f.T, min(n_top, len(f)), dim=-1)
        top_values = torch.cat([top_values, best.values], dim=-1)
        top_tokens = torch.cat([top_tokens, chunk.to(device)[best.indices]], dim=-1)
        keep = torch.topk(top_values, min(n_top, top_values.shape[1]), dim=-1)
        top_values, top_tokens = keep.values, top_tokens.gather(-1, keep.indices)
    return LatentStatistics(
        n_tokens=len(indices),
        n_firings=counts["all"].cpu(),
        n_completion_firings=counts["program"].cpu(),
        n_positive=counts["positive"].cpu(),
        mean_activation=(sums / counts["all"].clamp_min(1)).cpu(),
        top_values=top_values.cpu(),
        top_tokens=torch.where(top_values > 0, top_tokens, -1).cpu(),
    )
