"""Two libraries that a benchmark of fine-tuning puts beside the project's own ways; the project needs neither.

`pip install liger-kernel torchao` brings them, with nothing else that a machine with PyTorch for a GPU has not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from finqa.runtime.errors import UserError

LIGER, TORCHAO = "liger-kernel", "torchao"
MODULES = {LIGER: "liger_kernel", TORCHAO: "torchao"}


def missing(library: str) -> bool:
    """Whether `library` is named and not installed."""
    return bool(library) and find_spec(MODULES[library]) is None


def that_run(named: list[str] | None, needs: dict[str, str]) -> list[str]:
    """The names to measure: those of `named`, or all of `needs` whose library is there; says which are left out.

    Args:
        named: As the user gave them.
        needs: The library that each name needs, empty for none.

    Raises UserError where a name that the user gave needs a library that is not installed.
    """
    absent = [name for name in named or needs if missing(needs[name])]
    if named and absent:
        library = needs[absent[0]]
        raise UserError(f"'{absent[0]}' needs {library}, which is not installed: pip install {library}")
    for name in absent:
        print(f"left out, {needs[name]} is not installed: {name}", flush=True)
    return [name for name in named or needs if name not in absent]


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Of the libraries that are named."""
    return {library: version(library) for library in libraries if library}


@contextmanager
def mistral_put_back() -> Iterator[None]:
    """Liger replaces functions and classes of transformers' module for the whole process: afterwards they are back."""
    from transformers.models.mistral import modeling_mistral

    before = dict(vars(modeling_mistral))
    try:
        yield
    finally:
        modeling_mistral.__dict__.update(before)


def use_library(library: str, model: Any, own_loss: bool) -> None:
    """Put the library's kernels or products into a Mistral, before an adapter is put around its layers; nothing where
    none is named.

    Liger has rotation, norms and SwiGLU; with `own_loss` head and loss too, in the model's forward pass with labels.
    torchao casts the bf16 weights of the linear layers to float8 in each pass. The product for a weight's gradient is
    dropped where the layers are compiled, since nothing asks for it.
    """
    if library == LIGER:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]  no dependency
            apply_liger_kernel_to_mistral,
        )

        apply_liger_kernel_to_mistral(model=model, fused_linear_cross_entropy=own_loss)
    elif library == TORCHAO:
        from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports]  no dependency

        convert_to_float8_training(model.model.layers)
