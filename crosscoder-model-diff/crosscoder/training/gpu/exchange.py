"""What several processes of the step by hand exchange, each of which has its own latents and all tokens.

Sums are of fp32 numbers and rounded once, as in one process; of the auxiliary loss each process rounds what it adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from crosscoder.dictionaries.ranks import Ranks


def rows_and_product(own: Tensor, encoder: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The rows [batch, width] of all processes, and their product [batch, latent] with `encoder` [latent, width]; this
    one's `own` rows are multiplied while the others' are on their way."""
    if ranks.world == 1:
        return own, own @ encoder.t()
    n = len(own)
    x = own.new_empty(ranks.world * n, own.shape[1])
    arriving = ranks.begin_gather(own, x)
    product = own.new_empty(len(x), len(encoder))
    torch.mm(own, encoder.t(), out=ranks.rows(product))
    arriving.wait()
    for rows in (slice(0, ranks.rank * n), slice((ranks.rank + 1) * n, None)):
        torch.mm(x[rows], encoder.t(), out=product[rows])
    return x, product


def whole_sum(parts: Iterable[Tensor], rest: Callable[[slice], Tensor], like: Tensor, ranks: Ranks) -> Tensor:
    """[batch, width], of the dtype of `like`: the sum over all processes of what each has for the batch's rows, and of
    `rest`, which gives what is to be added to some of the rows once.

    `parts` are pieces of the rows in order, [rows, width] fp32; each is added up while the next one is computed.
    """
    whole, at, summed, arriving = torch.empty_like(like), 0, [], []
    for part in parts:
        summed.append((at, *ranks.begin_share_of_sum(part)))
        at += len(part)
    for at, share, sent in summed:
        sent.wait()
        start = at + ranks.rank * len(share)
        own = (share + rest(slice(start, start + len(share)))).to(like.dtype)
        arriving.append(ranks.begin_gather(own, whole[at : at + ranks.world * len(share)]))
    for sent in arriving:
        sent.wait()
    return whole


def smallest_kept(scores: Tensor, n_keep: int, ranks: Ranks) -> Tensor:
    """[batch, 1]: the smallest of each token's `n_keep` largest scores over the latents of all processes. `scores`
    [batch, n] are of this one's, and not negative; n may be another one in each."""
    best = torch.topk(scores, min(n_keep, scores.shape[1]), sorted=False).values
    if ranks.world > 1:
        filled = torch.nn.functional.pad(best, (0, n_keep - best.shape[1]), value=-1.0)
        everyone = ranks.gather(filled).transpose(0, 1).flatten(1)
        best = torch.topk(everyone, n_keep, sorted=False).values
    return best.amin(dim=-1, keepdim=True)
