"""Every test of the library runs with strict promotion, unless Flax or Optax would fail."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forbids implicit promotion of dtypes and ranks; `@pytest.mark.lax` allows it."""
    if request.node.get_closest_marker("lax"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
