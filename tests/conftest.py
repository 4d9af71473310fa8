"""Settings of every test: one torch thread a worker, seeds, and where the extra data is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
# Deadlines measure the machine, not the code; derandomized runs make a failure repeatable.
settings.register_profile(
    "mixbit",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("mixbit")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def full_data() -> Path:
    """The folder with the full images and weights, named by MIXBIT_DATA; tests that need it skip without."""
    folder = os.environ.get("MIXBIT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs the full data packs: set MIXBIT_DATA to their folder")
    return Path(folder)
