"""Every test of the library runs strictly, except those that Flax or Optax would fail."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit promotion of dtypes, nor of ranks; `@pytest.mark.lax` lifts it."""
    if request.node.get_closest_marker("lax"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
