"""What each latent does on a set of tokens, gathered in one pass at the inference threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crosscoder.activations.layout import KINDS, TEMPLATE
from crosscoder.activations.store import ActivationStore
from crosscoder.dictionaries.config import READ_TOKENS
from crosscoder.dictionaries.model import BatchTopKCrosscoder, products_of

if TYPE_CHECKING:
    from crosscoder.analysis.measures import VarianceSums


@dataclass(frozen=True)
class LatentStatistics:
    """Per latent, over `n_tokens` tokens; on the CPU."""

    n_tokens: int
    n_firings: Tensor
    """[latent] int64: tokens on which it is active."""
    n_completion_firings: Tensor
    """[latent] int64: tokens of completions (programs) among those."""
    n_positive: Tensor
    """[latent] int64: tokens on which it is positive, whether above the threshold or not."""
    mean_activation: Tensor
    """[latent] fp64: mean value where active; 0 where it never is."""
    mean_products: Tensor
    """[part, part, latent] fp64: mean over all tokens of the products of the values of its parts
    (BatchTopKCrosscoder.parts); of most methods one part, so its value squared."""
    top_values: Tensor
    """[latent, n_top]: its largest values, descending; 0 where it has fewer."""
    top_tokens: Tensor
    """[latent, n_top] int64: token indices of those in the store; -1 where it has fewer."""
    activation_by_kind: Tensor | None = None
    """[latent, kind] fp64: sum of its values on the tokens of each kind (token_kinds.KINDS); None where no kinds were
    given."""

    @property
    def template_share(self) -> Tensor | None:
        """[latent] fp64: share of its summed activation on template tokens; 0 where it is never active. A latent with a
        share near 1 marks the template, and says nothing about the document. None where no latent is active on any
        template token, as on plain texts."""
        if self.activation_by_kind is None:
            return None
        of_template = self.activation_by_kind[:, [KINDS.index(kind) for kind in TEMPLATE]].sum(dim=1)
        if not of_template.any():
            return None
        total = self.activation_by_kind.sum(dim=1)
        return torch.where(total > 0, of_template / total, 0.0)

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
    model: BatchTopKCrosscoder,
    store: ActivationStore,
    indices: Tensor,
    n_top: int = 20,
    batch_size: int = READ_TOKENS,
    kinds: Tensor | None = None,
    variance: VarianceSums | None = None,
) -> LatentStatistics:
    """Run the tokens at `indices` of the store through the encoder once.

    `kinds` [tokens of the store] is token_kinds.token_kinds', for what a latent does on each kind of token. The tokens
    are added to `variance` in the same pass.
    """
    device = model.b_dec.device
    n_latents = model.config.n_latents
    completion = store.is_completion()
    counts = {name: torch.zeros(n_latents, dtype=torch.int64, device=device) for name in ("all", "program", "positive")}
    sums = torch.zeros(n_latents, dtype=torch.float64, device=device)
    products = torch.zeros((), dtype=torch.float64, device=device)
    by_kind = None if kinds is None else torch.zeros(n_latents, len(KINDS), dtype=torch.float64, device=device)
    top_values = torch.zeros(n_latents, 0, device=device)
    top_tokens = torch.zeros(n_latents, 0, dtype=torch.int64, device=device)
    for chunk, raw in store.batches(indices, batch_size, "what latents do, tokens"):
        x = model.scale(raw.to(device))
        values = model.activations(x)
        f = model.select_by_threshold(values)
        active = f > 0
        if variance is not None:
            variance.add(raw, read=model.reconstruct(x, f))
        counts["all"] += active.sum(dim=0)
        counts["program"] += active[completion[chunk].to(device)].sum(dim=0)
        counts["positive"] += (values > 0).sum(dim=0)
        sums += f.sum(dim=0, dtype=torch.float64)
        products = products + products_of(model.parts(x, f))
        if kinds is not None and by_kind is not None:
            by_kind += f.T @ torch.nn.functional.one_hot(kinds[chunk], len(KINDS)).to(f)
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
        mean_products=(products / max(1, len(indices))).cpu(),
        top_values=top_values.cpu(),
        top_tokens=torch.where(top_values > 0, top_tokens, -1).cpu(),
        activation_by_kind=None if by_kind is None else by_kind.cpu(),
    )
