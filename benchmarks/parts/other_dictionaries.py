"""Training steps of released dictionary packages: the nearest thing that each has to a crosscoder of two models.

None has one. Each trains an autoencoder of both models' activations as one vector of 2 * d_model, with its own loss and
clipped Adam:

    dictionary-learning    BatchTopKTrainer.update, fp32 with TF32 allowed
    eai-sparsify           SparseCoder (top-k a token) by its own trainer's order, its own bf16 autocast
    sae-lens               BatchTopKTrainingSAE, bf16 autocast

What each needs beside the project's own packages, all pure Python; fetched with `pip download --no-deps` and unpacked
into one folder on PYTHONPATH (Python 3.11, torch 2.13):

    dictionary-learning    dictionary_learning 0.1.0
    eai-sparsify           eai_sparsify 1.3.3, simple_parsing 0.1.9, natsort 8.4.0, schedulefree 1.4.1
    sae-lens               sae_lens 6.54.12, transformer_lens 3.9.0, jaxtyping 0.3.11, better_abc
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def dictionary_learning(n_latents: int, args: argparse.Namespace) -> Callable[[Tensor], object]:
    import torch
    from dictionary_learning.trainers.batch_top_k import (  # pyright: ignore[reportMissingImports]
        BatchTopKTrainer,
    )

    torch.backends.cuda.matmul.allow_tf32 = True
    width, numbers = 2 * args.d_model, count()
    trainer = BatchTopKTrainer(10**6, width, n_latents, args.k, 0, "-", lr=args.learning_rate, device=args.device)
    return lambda x: trainer.update(next(numbers), x)


def eai_sparsify(n_latents: int, args: argparse.Namespace) -> Callable[[Tensor], object]:
    from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
    from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]

    config = SparseCoderConfig(num_latents=n_latents, k=args.k)
    sae = SparseCoder(2 * args.d_model, config, device=args.device)
    return with_adam(sae, args, lambda x: sae(x).fvu, sae.remove_gradient_parallel_to_decoder_directions,
                     sae.set_decoder_norm_to_unit_norm)  # fmt: skip


def sae_lens(n_latents: int, args: argparse.Namespace) -> Callable[[Tensor], object]:
    import torch
    from sae_lens.saes.batchtopk_sae import (  # pyright: ignore[reportMissingImports]
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

    config = BatchTopKTrainingSAEConfig(d_in=2 * args.d_model, d_sae=n_latents, k=args.k, device=args.device)
    sae = BatchTopKTrainingSAE(config)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16):
            return sae.training_forward_pass(TrainStepInput(x, {}, None, 1, False)).loss

    return with_adam(sae, args, loss)


def with_adam(
    model: Any, args: argparse.Namespace, loss: Callable[[Tensor], Tensor], *constraints: Callable[[], object]
) -> Callable[[Tensor], object]:
    """A step: loss, gradients, the first constraint, clipping, fused Adam, the others."""
    import torch

    adam = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)

    def step(x: Tensor) -> None:
        adam.zero_grad(set_to_none=True)
        loss(x).backward()
        for constraint in constraints[:1]:
            constraint()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        for constraint in constraints[1:]:
            constraint()

    return step


OTHERS = {"dictionary-learning": dictionary_learning, "eai-sparsify": eai_sparsify, "sae-lens": sae_lens}
