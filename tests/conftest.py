"""The setup of every test: eight fake devices on a CPU, and shared fixtures.

The suite runs on the CPU unless JAX_PLATFORMS names another platform. Compiling is most of the
work. So programs are compiled with few optimizations and kept in .compiled, where the next run and
other test processes find them. `XLA_FLAGS= pytest` compiles like users' programs.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.sharding import AxisType, Mesh

# Processes that tests start inherit the environment.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
if "XLA_FLAGS" not in os.environ:
    # Compile each program in one piece, with few LLVM passes and the older fusion emitters, which
    # newer JAX lacks. XLA's own result before LLVM stays the same: products, fusions and memory.
    quickly = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):
        quickly.append("--xla_cpu_use_fusion_emitters=false")
    os.environ |= {"XLA_FLAGS": " ".join(quickly), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".compiled"))
# Keep every program, also of processes that tests start. XLA's own caches would put the folder's
# path into the compiler's options and so into the key: another clone would find nothing.
kept = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_enable_xla_caches": "none",
}
for name, value in kept.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)
if not hasattr(jax, "enable_x64"):  # JAX 0.7 has it elsewhere
    jax.enable_x64 = jax.experimental.enable_x64

# Each new shape compiles, so examples are few and none has a deadline.
hypothesis.settings.register_profile(
    "local", deadline=None, max_examples=10, database=None, print_blob=True
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def x64() -> Iterator[None]:
    """Lets JAX use float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def kept_programs() -> dict[str, str]:
    """Environment variables that let a process share the kept programs.

    A process that is killed while it compiles could leave half a program. Use this fixture only if
    the process is not killed then, or if an earlier process has compiled the same programs.
    """
    return {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}


@pytest.fixture
def compiled_as_for_users() -> Iterator[None]:
    """Enables all compiler passes, for a test that asserts their result or trains for long."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    quickly = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"  # as set above
    jax.config.update("jax_disable_most_optimizations", quickly)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    """Four devices along the axis "devices", once with Auto and once with Explicit sharding."""
    if jax.device_count() < 4:
        pytest.skip(f"needs 4 devices, {jax.devices()[0].platform} has {jax.device_count()}")
    four = jax.make_mesh((4,), ("devices",), (request.param,), devices=jax.devices()[:4])
    with jax.set_mesh(four):
        yield four
