"""Accelerators that `compile` compiles programs for. None has to be present.

Their compilers are ordinary packages that run on any x86-64 Linux CPU. The compiled program says
which memory, collectives and kernels it would use, but not how fast it would run.
"""

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, Sharding, SingleDeviceSharding
from jax.stages import Compiled, Lowered

from experiments.benchmarks import peers

# These variables keep libtpu from looking for the TPU host that it runs on.
_NO_HOST = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is taken, so two processes may compile
}


class Chip(NamedTuple):
    """One accelerator, in its maker's numbers."""

    platform: Literal["tpu", "cuda"]
    memory: int  # bytes, as its compiler or driver counts them
    tflops: float  # 1e12 bf16 multiplications and additions a second, no sparsity
    bandwidth: float  # 1e9 bytes a second of its memory
    link: float  # 1e9 bytes a second sent to other chips, over all links
    source: str
    config: str = ""  # of a GPU: what XLA's compiler asks a device for


_TABLE = tomllib.loads(Path(__file__).with_name("chips.toml").read_text())
CHIPS = {name: Chip(**numbers) for name, numbers in _TABLE.items()}

# libtpu describes no single chip: for one chip, take the first of its smallest slice.
_SMALLEST = {"v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
_NEEDED = {
    "tpu": ("libtpu", 'pip install -e ".[aot-tpu]"'),
    "cuda": ("jax-cuda12-plugin", 'pip install -e ".[aot-gpu]" (5.6 GB)'),
}


def how_much(message: str) -> str:
    """The memory that a program needs and the memory that there is, from a compiler's error."""
    found = re.search(r"Used (\S+) of (\S+) hbm", message) or re.search(
        r"\((\S+)\) exceeds available \D*\(?([\d.]+\w)", message
    )
    return f"{found[1]} of {found[2]}" if found else message[:60]


class Target(NamedTuple):
    """Chips to compile for."""

    name: str
    chip: Chip
    devices: list[Any]

    @property
    def one(self) -> SingleDeviceSharding:
        """On its first chip."""
        return SingleDeviceSharding(self.devices[0])

    def lower(self, step: Callable[..., Any], *operands: Any, **options: Any) -> Lowered:
        """A function of arrays, lowered for its first chip; the options are those of `jax.jit`."""
        return jax.jit(step, **options).lower(*placed(operands, self.one))

    def compile(self, lowered: Lowered) -> Compiled | str:
        """A program for this target, or how much of how much memory a TPU's compiler refuses it."""
        # Without this the compiler for GPUs would time kernels on a device.
        options: dict[str, Any] = {"xla_gpu_autotune_level": 0} if self.chip.config else {}
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return how_much(str(error))

    def mesh(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> Mesh:
        """Chips in the order that they are listed."""
        chips = np.array(self.devices[: np.prod(shape)]).reshape(shape)
        return Mesh(chips, axes, axis_types=(AxisType.Auto,) * len(axes))


def placed(tree: Any, sharding: Sharding) -> Any:
    """Arrays, abstract, where a sharding puts them."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def compilers() -> dict[str, str]:
    """The versions of the compilers that are installed."""
    return peers.versions(("libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"))


def target(name: str) -> Target:
    """The target of a name: v5e:2x4, a slice of so many chips; v5e or h100, one chip.

    Raises:
      ValueError: an unknown name, or its compiler is not installed; the message says what to do.
    """
    kind, _, slice_ = name.partition(":")
    if kind not in CHIPS or (slice_ and CHIPS[kind].platform == "cuda"):
        known = ", ".join(f"{k}:{_SMALLEST[k]}" if k in _SMALLEST else k for k in CHIPS)
        raise ValueError(f"targets must be such as {known}, got {name!r}")
    chip = CHIPS[kind]
    # JAX looks for a TPU as soon as libtpu is installed, unless it is told to use the CPU.
    jax.config.update("jax_platforms", "cpu")
    package, cure = _NEEDED[chip.platform]
    if package not in compilers():
        raise ValueError(f"{name} needs its compiler: {cure}")
    if chip.platform == "cuda":
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=chip.config
        )
        return Target(name, chip, list(described.devices))
    for variable, value in _NO_HOST.items():
        os.environ.setdefault(variable, value)
    try:
        described = topologies.get_topology_desc(
            f"{kind}:{slice_ or _SMALLEST[kind]}", platform="tpu"
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"targets: there is no slice {name!r}: {error}") from error
    return Target(name, chip, list(described.devices)[: None if slice_ else 1])
