"""A few rounds of `make fuzz`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import fuzz


@pytest.mark.slow
@pytest.mark.ci
def test_losses_and_gradients_are_those_of_the_reference():
    # The limit is rounds, not seconds, so that a slow machine draws the same cases.
    assert fuzz.fuzz(seconds=600, seed=7, rounds=6) == 0
