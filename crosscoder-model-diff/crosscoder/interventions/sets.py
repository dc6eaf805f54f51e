"""What is added at a site: sets of latents, and the controls that they are held against.

An addition is a vector for every token, in the models' own units, made from what both models give there. Added to the
instruct model it should make it more like the fine-tuned one; taken from the fine-tuned model, the reverse.

    latents             sum over S of f_j (W_dec[j,1]/c_1 - W_dec[j,0]/c_0); of a difference SAE f_j W_dec[j]/c; of a
                        stagewise SAE f_j[1] W_dec[j,1]/c - f_j[0] W_dec[j,0]/c, with a value for each model
    random directions   the latents' values on random directions, each token's vector as long as the set's
    components          x[1] - x[0] on the first n directions of its (uncentred) PCA, or of another basis
    scaled              any of these times a number, so that sets are compared at one injected norm
    mean difference     the mean of x[1] - x[0], the same vector everywhere
    bias                what the dictionary adds where no latent is active
    whole               x[1] - x[0]: the ceiling
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from crosscoder.dictionaries.model import BatchTopKCrosscoder


class Reading:
    """What both models give at the site for some tokens, and what dictionaries make of it (each asked once)."""

    def __init__(self, pairs: Tensor):
        """`pairs` [tokens, 2, d_model], raw."""
        self.pairs = pairs.float()
        self._parts: dict[int, Tensor] = {}
        self._last: tuple[Addition, Tensor] | None = None

    @property
    def difference(self) -> Tensor:
        """[tokens, d_model]: fine-tuned less instruct."""
        return self.pairs[:, 1] - self.pairs[:, 0]

    def values(self, dictionary: BatchTopKCrosscoder) -> Tensor:
        """[tokens, latent] at the inference threshold."""
        return self.parts(dictionary)[:, 0]

    @torch.no_grad()
    def parts(self, dictionary: BatchTopKCrosscoder) -> Tensor:
        """[tokens, part, latent]: values of what each latent adds (BatchTopKCrosscoder.parts); of most methods one.

        0 for a token above the dictionary's `largest_norms`: it was trained on none, and what it makes of an attention
        sink can be many times as long as all else that it adds.
        """
        if id(dictionary) not in self._parts:
            x = dictionary.scale(self.pairs)
            parts = dictionary.parts(x, dictionary.encode(x))
            if dictionary.largest_norms:
                above = self.pairs.norm(dim=-1) > self.pairs.new_tensor(dictionary.largest_norms)
                parts.masked_fill_(above.any(dim=-1)[:, None, None], 0.0)
            self._parts[id(dictionary)] = parts
        return self._parts[id(dictionary)]

    @torch.no_grad()
    def added(self, addition: Addition) -> Tensor:
        """[tokens, d_model] of the addition; that of the last one is kept."""
        if self._last is None or self._last[0] is not addition:
            self._last = addition, addition(self)
        return self._last[1]


class Addition(Protocol):
    """A vector for every token."""

    label: dict[str, Any]
    """What tells it apart from every other: kind, number of latents or directions, seed, digest."""
    reads: bool
    """It depends on what the models give; one that does not takes no second model at generation."""

    def __call__(self, reading: Reading) -> Tensor:
        """[tokens, d_model] fp32."""
        ...


class Nothing:
    """The receiving model with the carrier's layers above, as it is."""

    reads = False

    def __init__(self) -> None:
        self.label = {"kind": "none", "n": 0}

    def __call__(self, reading: Reading) -> Tensor:
        return torch.zeros_like(reading.difference)


class Whole:
    """All of the difference: the site's activation becomes the other model's, exactly."""

    reads = True

    def __init__(self) -> None:
        self.label = {"kind": "ceiling", "n": 0}

    def __call__(self, reading: Reading) -> Tensor:
        return reading.difference


class Latents:
    """A set of latents of a dictionary."""

    reads = True

    def __init__(self, dictionary: BatchTopKCrosscoder, latents: Sequence[int], kind: str = "latents", seed: int = 0):
        self.dictionary = dictionary
        self.latents = torch.tensor(sorted(latents), dtype=torch.int64, device=dictionary.b_dec.device)
        self.seed = seed
        made_of = f"{dictionary_digest(dictionary)}-{digest(self.latents)}"
        self.label = {"kind": kind, "n": len(self.latents), "seed": seed, "digest": made_of}

    def vectors(self) -> Tensor:
        """[parts * latents, d_model]: what one unit of each adds. Not kept: many sets of a large dictionary are under
        way."""
        return difference_parts(self.dictionary)[:, self.latents].flatten(0, 1)

    def values(self, reading: Reading) -> Tensor:
        """[tokens, parts * latents] fp32: how much of each of `vectors`."""
        return reading.parts(self.dictionary)[:, :, self.latents].flatten(1).float()

    def __call__(self, reading: Reading) -> Tensor:
        return self.values(reading) @ self.vectors()


class RandomDirections(Latents):
    """The values of a set on random directions; each token's vector is as long as the set's own."""

    def __init__(self, dictionary: BatchTopKCrosscoder, latents: Sequence[int], seed: int):
        super().__init__(dictionary, latents, "random directions", seed)

    def __call__(self, reading: Reading) -> Tensor:
        vectors = self.vectors()
        generator = torch.Generator(vectors.device).manual_seed(self.seed)
        drawn = torch.randn(vectors.shape, generator=generator, device=vectors.device)
        drawn *= vectors.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
        f = self.values(reading)
        ours, wanted = f @ drawn, (f @ vectors).norm(dim=-1, keepdim=True)
        return ours * (wanted / ours.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(ours.dtype).tiny))


class Constant:
    """The same vector [d_model] for every token."""

    reads = False

    def __init__(self, kind: str, vector: Tensor):
        self.vector = vector
        self.label = {"kind": kind, "n": 0, "digest": digest(vector)}

    def __call__(self, reading: Reading) -> Tensor:
        return self.vector.to(reading.pairs).expand(len(reading.pairs), -1)


class Components:
    """The part of the difference that lies in a few directions: `basis` [directions, d_model], orthonormal, as those of
    its PCA are."""

    reads = True

    def __init__(self, basis: Tensor):
        self.basis = basis
        self.label = {"kind": "components", "n": len(basis), "digest": digest(basis)}

    def __call__(self, reading: Reading) -> Tensor:
        basis = self.basis.to(reading.pairs)
        return (reading.difference @ basis.T) @ basis


class Scaled:
    """Another addition times a number: sets are compared at one `injected_norm`."""

    def __init__(self, addition: Addition, factor: float):
        self.addition, self.factor, self.reads = addition, factor, addition.reads
        its = addition.label
        self.label = its | {"kind": f"{its['kind']}, scaled", "digest": f"{its.get('digest', '')}-{digest(factor)}"}

    def __call__(self, reading: Reading) -> Tensor:
        return self.factor * self.addition(reading)


def injected_norm(addition: Addition, readings: Iterable[Reading]) -> float:
    """Root mean square over the tokens of all readings of the length of what is added, in the models' own units."""
    squares, n_tokens = 0.0, 0
    for reading in readings:
        added = addition(reading)
        squares += float(added.double().square().sum())
        n_tokens += len(added)
    return (squares / max(1, n_tokens)) ** 0.5


def bias_of(dictionary: BatchTopKCrosscoder) -> Constant:
    """What the dictionary's decoder adds to fine-tuned less instruct where no latent is active."""
    with torch.no_grad():
        return Constant("bias", dictionary.difference(dictionary.unscale(dictionary.b_dec)).float())


def matched_set(
    chosen: Sequence[int], frequency: Tensor, injected: Tensor, candidates: Sequence[int], seed: int, nearest: int = 8
) -> list[int] | None:
    """As many other latents, alike in firing frequency and injected norm; None where too few are left.

    For each of `chosen`, in a random order, one of the `nearest` candidates that are left is drawn, by distance in
    the logarithms of `frequency` and `injected` [latent], each over its spread among the candidates.
    """
    free = sorted(set(candidates) - set(chosen))
    if len(free) < len(chosen):
        return None
    generator = torch.Generator().manual_seed(seed)
    logs = torch.stack([frequency.double(), injected.double()], dim=-1).cpu()
    logs = logs.clamp_min(logs[logs > 0].min() if (logs > 0).any() else 1.0).log()
    logs = logs / logs[free].std(dim=0, correction=0).clamp_min(1e-9)
    left, drawn = torch.tensor(free), []
    for place in torch.randperm(len(chosen), generator=generator).tolist():
        distance = (logs[left] - logs[chosen[place]]).norm(dim=-1)
        near = torch.topk(distance, min(nearest, len(left)), largest=False).indices
        pick = int(near[torch.randint(len(near), (1,), generator=generator)])
        drawn.append(int(left[pick]))
        left = torch.cat([left[:pick], left[pick + 1 :]])
    return drawn


def sizes_to(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    powers = [1 << exponent for exponent in range(n.bit_length())] if n else []
    return sorted({*powers, n} - {0})


_decoders: WeakKeyDictionary[BatchTopKCrosscoder, Tensor] = WeakKeyDictionary()
_digests: WeakKeyDictionary[BatchTopKCrosscoder, str] = WeakKeyDictionary()


def difference_parts(dictionary: BatchTopKCrosscoder) -> Tensor:
    """[part, latent, d_model] fp32: the dictionary's difference_parts, computed once."""
    if dictionary not in _decoders:
        _decoders[dictionary] = dictionary.difference_parts().float()
    return _decoders[dictionary]


def dictionary_digest(dictionary: BatchTopKCrosscoder) -> str:
    """Hash of all that shapes what a trained dictionary reads and writes; taken once."""
    if dictionary not in _digests:
        means = [] if dictionary.activation_means is None else [dictionary.activation_means]
        thresholds, scales = dictionary.latent_thresholds(), torch.tensor(dictionary.activation_scales)
        numbers = digest(scales, thresholds, *dictionary.further_thresholds, *means, *dictionary.largest_norms)
        settings = f"{dictionary.config}-{numbers}-{weights_digest(dictionary)}"
        _digests[dictionary] = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return _digests[dictionary]


def digest(*values: Tensor | float) -> str:
    """Hash of the very numbers, wherever they lie."""
    found = hashlib.sha256()
    for value in values:
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """Hash of a model in memory, from sums of its parameters' bits, so that no device or order changes it."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        bits = parameter.detach().contiguous().flatten().view(integers[parameter.element_size()])
        plain = weighted = 0
        for start in range(0, len(bits), 1 << 24):
            part = bits[start : start + (1 << 24)].to(torch.int64)
            place = torch.arange(start, start + len(part), device=part.device) % 65_521 + 1
            plain += int(part.sum())
            weighted += int((part * place).sum())
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {plain} {weighted}\n".encode())
    return found.hexdigest()[:16]
