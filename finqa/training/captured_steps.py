"""Forward and backward pass as one CUDA graph: at one short row an update, launching kernels is most of the time.

A graph replays the kernels of one batch shape. Shapes are few, because packed batches are rounded up in length. The
first batch of a shape runs as always; at the second the kernels are recorded; from then on they are replayed on that
shape's own input tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    n_items: Tensor
    loss: Tensor


class CapturedSteps:
    """Computes loss and gradients of packed batches, on one GPU.

    Args:
        parameters: What is trained. Gradients are added to tensors that stay the same from step to step, and those of
            one dtype lie one after the other, so that several processes add them up in one go.
        loss: Called with a batch and the number of labelled tokens (a 0-dim tensor); returns the loss, 0-dim.
        longest: Tokens of a batch above which it is not recorded (packing.longest_graph).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], loss: Callable[[dict[str, Any], Tensor], Tensor], longest: int
    ) -> None:
        self.loss, self.longest = loss, longest
        self.parameters = parameters
        self.sums, views = [], {}
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            alike = [parameter for parameter in parameters if parameter.dtype == dtype]
            sizes = [parameter.numel() for parameter in alike]
            self.sums.append(torch.zeros(sum(sizes), dtype=dtype, device=alike[0].device))
            views.update(zip(alike, self.sums[-1].split(sizes), strict=True))
        self.gradients = [views[parameter].view_as(parameter) for parameter in parameters]
        self.graphs: dict[tuple[Any, ...], _Graph | None] = {}
        self.pool: Any = torch.cuda.graph_pool_handle()
        # Everything runs on one stream: autograd remembers on which one a gradient was first added up.
        self.stream = torch.cuda.Stream()

    def __call__(self, batch: dict[str, Any], n_items: Tensor) -> Tensor:
        """Add the batch's gradients to `.grad` of each parameter (from zero where it is None); returns the loss."""
        self._take_gradients()
        shape = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in batch.values())
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self._run(shape, batch, n_items)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _run(self, shape: tuple[Any, ...], batch: dict[str, Any], n_items: Tensor) -> Tensor:
        if batch["input_ids"].numel() > self.longest or shape not in self.graphs:
            self.graphs.setdefault(shape, None)
            return self._step(batch, n_items)
        captured = self.graphs[shape]
        if captured is None:
            captured = self.graphs[shape] = self._capture(batch, n_items)
        for name, tensor in captured.inputs.items():
            if isinstance(tensor, Tensor):
                tensor.copy_(batch[name], non_blocking=True)
        captured.n_items.copy_(n_items)
        captured.graph.replay()
        return captured.loss.clone()

    def _step(self, batch: dict[str, Any], n_items: Tensor) -> Tensor:
        loss = self.loss(batch, n_items)
        loss.backward()
        return loss.detach()

    def _capture(self, batch: dict[str, Any], n_items: Tensor) -> _Graph:
        inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in batch.items()}
        items = n_items.clone()
        graph = torch.cuda.CUDAGraph()
        # What other threads do meanwhile (that of NCCL looks whether sums are done) must not end the recording.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            loss = self._step(inputs, items)
        return _Graph(graph, inputs, items, loss)

    def _take_gradients(self) -> None:
        """The Trainer drops gradients after each update; put ours in their place, at zero."""
        if self.parameters[0].grad is None:
            for gradients in self.sums:
                gradients.zero_()
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
