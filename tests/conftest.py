"""What every test shares: eight fake devices on a CPU, fixtures named after what they do.

The suite runs on the CPU unless JAX_PLATFORMS names another platform. Compiling is most of its
work: programs are compiled quickly, at the cost of their speed, and kept in .compiled, where the
next run and the other test processes find them. `XLA_FLAGS= pytest` compiles them as users'
programs are.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jax.sharding import AxisType, Mesh

# The processes that tests start read the environment.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
if "XLA_FLAGS" not in os.environ:
    # Each program in one piece, by few of LLVM's passes and by the older way from a fusion to LLVM,
    # which JAX 0.12 no longer has: what XLA makes of a program before that, its products, fusions
    # and memory, stays.
    quickly = ["--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):
        quickly.append("--xla_cpu_use_fusion_emitters=false")
    os.environ |= {"XLA_FLAGS": " ".join(quickly), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
if jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".compiled"))
# Every program is kept, here and in the processes that tests start, under a key without the
# folder's path, which is otherwise one of the compiler's options: another clone would find nothing.
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
    """float64 stays float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def kept_programs() -> dict[str, str]:
    """The environment with which a process shares the programs that are kept.

    Only for a process that is not killed before it has compiled everything, or after another one
    that compiled the same: half a program could stay there.
    """
    return {"JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir)}


@pytest.fixture
def compiled_as_for_users() -> Iterator[None]:
    """All of the compiler's passes, for a test that asserts what they make or trains for long."""
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
