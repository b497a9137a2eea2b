"""Fixtures of the experiments' tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jax.sharding import Mesh

from experiments.paper.config import Config
from experiments.paper.data import import_tfds
from experiments.run import train
from experiments.run.program import Program, load


@pytest.fixture(scope="session")
def tfds() -> None:
    """Skips if TFDS cannot be imported, as with the pins of Colab's CPU and GPU runtimes."""
    try:
        import_tfds()
    except ImportError as error:
        pytest.skip(str(error))


def real_data(variable: str, expected: str, source: str) -> Path:
    """The folder that an environment variable names; skips if the expected entry is missing."""
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


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Runs of one configuration on the same data share their traced functions.

    Each run would trace its own, which takes longer than its updates. What is compiled is the same:
    `.compiled` has it.
    """
    programs, make = {}, train.Program

    def shared(config: Config, folder: Path | None, mesh: Mesh) -> Program:
        key = config, load(config, folder).fingerprint, mesh
        if key not in programs:
            programs[key] = make(config, folder, mesh)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Program", shared)
        yield
