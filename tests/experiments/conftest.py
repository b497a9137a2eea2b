"""Fixtures of the experiments' tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.paper.data import import_tfds


@pytest.fixture(scope="session")
def tfds() -> None:
    """TFDS can be imported; not so with the pins of Colab's CPU and GPU runtimes."""
    try:
        import_tfds()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled() -> Iterator[None]:
    """XLA optimises little: in runs of seconds that costs more than it saves.

    The library's own tests are optimised as its users' programs are, and so is a module here that
    asserts what the compiler makes of a program: it overrides this. Processes that a test starts
    are told the same.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs: a module often runs the same one again, and compiling dominates."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def real_data(variable: str, expected: str, source: str) -> Path:
    """The folder that an environment variable names, if it holds what is expected there."""
    folder = os.environ.get(variable, "")
    if not folder or not (Path(folder) / expected).exists():
        pytest.skip(f"no {expected} in {variable}={folder!r}; {source}")
    return Path(folder)


@pytest.fixture(scope="session")
def tfds_dir(tfds: None) -> Path:
    """The folder of prepared TFDS data sets, MNIST among them."""
    source = "tfds.load('mnist', data_dir=...) writes it where '.[prepare]' is installed"
    return real_data("TFDS_DATA_DIR", "mnist", source)


@pytest.fixture(scope="session")
def lfw_dir() -> Path:
    """The folder of LFW's images, one folder a person, and its pairs.txt."""
    return real_data("LFW_DIR", "pairs.txt", "LFW's own page has the images and the pairs")
