"""Small real parts for the crosscoder's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from crosscoder.activation_store import ActivationStore
from made_up_activations import D_MODEL, DOCUMENT_TOKENS, N_DOCUMENTS, planted_activations, write_store


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    """2,000 tokens in 40 documents, planted from 16 directions, in three shards."""
    folder = tmp_path / "activations"
    write_store(folder, planted_activations(N_DOCUMENTS * DOCUMENT_TOKENS, D_MODEL, 16), shard_tokens=800)
    return ActivationStore(folder)
