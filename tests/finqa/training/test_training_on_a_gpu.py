"""What fine-tuning runs on a GPU alone, held against plain torch there."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


def tiny_model(layers: int = 2) -> Any:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=None,
    )  # fmt: skip
    return MistralForCausalLM(config).cuda().bfloat16()


def test_packed_attention_is_each_row_by_itself_forwards_and_backwards():
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from finqa.training.packing import packed_attention

    torch.manual_seed(0)
    starts = torch.tensor([0, 5, 133, 256, 256], dtype=torch.int32, device="cuda")
    query = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = (torch.randn(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out, _ = packed_attention(torch.nn.Identity(), query, key, value, None, 0.125, starts, 128)
    expected = torch.cat(
        [
            scaled_dot_product_attention(
                *(x[:, :, begin:end].double() for x in (query, key, value)),
                is_causal=True,
                scale=0.125,
                enable_gqa=True,
            )
            for begin, end in pairwise(starts.tolist())
            if end > begin
        ],
        dim=2,
    ).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), direction)
    theirs = torch.autograd.grad(expected, (query, key, value), direction.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=5e-2, atol=5e-2)


def test_a_recorded_step_gives_the_loss_and_gradients_of_a_plain_one_for_every_shape():
    import torch

    from finqa.training.captured_steps import CapturedSteps
    from finqa.training.packing import LONGEST_GRAPH, packed_collator, use_packed
    from finqa.training.rows import example
    from finqa.training.trainable import loss_on_completion

    model = tiny_model()
    assert use_packed(model)
    loss_on_completion(model)
    parameters = list(model.parameters())
    steps = CapturedSteps(parameters, lambda batch, n: model(**batch, num_items_in_batch=n).loss, LONGEST_GRAPH)
    rows = [example(str(i), tuple(3 + (i * 7 + j) % 100 for j in range(60 + 40 * i)), 40) for i in range(6)]
    collate = packed_collator(0)
    for number, row in enumerate([*rows, *rows, *rows]):
        batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in collate([row]).items() if k != "n_tokens"}
        n_items = torch.tensor(row["n_tokens"] - row["n_prompt"], device="cuda")
        model.zero_grad()
        plain = model(**batch, num_items_in_batch=n_items).loss
        expected = [gradient.clone() for gradient in torch.autograd.grad(plain, parameters)]
        plain = plain.detach()  # its graph belongs to the stream that nothing may wait for while a step is recorded
        model.zero_grad()
        loss = steps(batch, n_items)
        torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-3, msg=f"step {number}")
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=2e-2, atol=1e-3, msg=f"step {number}")
    assert any(steps.graphs.values())


def test_an_8_bit_product_is_near_the_exact_one_and_so_is_its_gradient():
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no 8-bit float products")
    from finqa.training.fp8_base import Fp8Linear

    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 512, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(3, 100, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = Fp8Linear(linear)(x)
    exact = x.double() @ linear.weight.double().t()
    direction = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, direction)
    exact_gradient = direction.double() @ linear.weight.double()
    for ours, theirs in ((out, exact), (gradient, exact_gradient)):
        # e4m3 has three bits behind the point: 2.5% a factor at most, less on average.
        assert (ours.double() - theirs).norm() / theirs.norm() < 0.05
