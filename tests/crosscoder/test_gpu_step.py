"""The hand-written step of a GPU is the step that autograd takes.

pytest -m gpu tests/crosscoder/test_gpu_step.py
TRITON_INTERPRET=1 pytest tests/crosscoder/test_gpu_step.py     without a GPU, where Triton is installed
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("score_norm", ["sum", "l2"])
@pytest.mark.parametrize("reconstruction", ["mse", "l2"])
def test_weights_follow_those_of_autograd_with_and_without_dead_latents(reconstruction, score_norm):
    pytest.importorskip("triton")
    import torch

    from crosscoder.config import CrosscoderConfig
    from crosscoder.model import BatchTopKCrosscoder
    from crosscoder.training import losses
    from crosscoder.training.gpu_step import GpuStep

    device = "cpu" if INTERPRETED else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False

    def fresh():
        config = CrosscoderConfig(d_model=12, n_latents=48, k=4, score_norm=score_norm)
        model = BatchTopKCrosscoder(config, generator=torch.Generator().manual_seed(1)).to(device)
        model.activation_scales = (0.9, 1.1)
        return model, torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))

    (expected, expected_adam), (model, adam) = fresh(), fresh()
    step = GpuStep(model, adam, reconstruction, max_grad_norm=1.0, product_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        raw = torch.randn(40, 2, 12, generator=generator).to(device)
        dead = torch.tensor([3, 7, 11, 20], device=device) if number > 2 else None

        x = expected.scale(raw)
        values = expected.activations(x)
        selection = expected.select_batch_topk(values)
        xhat = expected.decode(selection.values)
        loss = expected_reconstruction = losses.reconstruction_loss(x, xhat, reconstruction)
        auxiliary = torch.zeros((), device=device)
        if dead is not None:
            mask = torch.zeros(48, dtype=torch.bool, device=device).index_fill(0, dead, True)
            scores = values.detach() * expected.selection_norms().detach()
            kept = losses.auxiliary_values(values, scores, mask, 2)
            auxiliary = losses.auxiliary_loss((x - xhat).detach(), expected.decode_without_bias(kept))
            loss = loss + 0.3 * auxiliary
        expected_adam.zero_grad()
        loss.backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        expected_adam.step()

        done = step(raw, learning_rate=1e-2, dead=dead, aux_k=2, aux_weight=0.3)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(done.reconstruction, expected_reconstruction.detach(), **close)
        torch.testing.assert_close(done.auxiliary, auxiliary.detach(), **close)
        torch.testing.assert_close(done.gradient_norm, gradient_norm, **close)
        torch.testing.assert_close(done.smallest_score, selection.smallest_score, **close)
        assert done.selected.equal((selection.values > 0).any(0))
        assert done.positive.equal((values > 0).any(0))
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, where=(number, name): f"{where}: {m}", **close)
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(adam.state[model.W_enc][name], expected_adam.state[expected.W_enc][name], **close)
