"""Installs this clone, with what its notebooks need, beside the JAX that a runtime came with.

A JAX that is new enough stays as it is. An older one moves together with the plugin of the
runtime's accelerator, which works with its own version of JAX alone.
"""

import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

CLONE = Path(__file__).resolve().parents[1]

# JAX's extra by the distribution that it installs for an accelerator.
PLUGINS = {
    "libtpu": "jax[tpu]",
    "jax-cuda12-plugin": "jax[cuda12]",
    "jax-cuda13-plugin": "jax[cuda13]",
}


def lowest_jax() -> str:
    """The bound that pyproject.toml declares."""
    (bound,) = re.findall(r'"jax>=([\d.]+)"', (CLONE / "pyproject.toml").read_text())
    return bound


def requirements(installed: Mapping[str, str], lowest: str) -> list[str]:
    """What pip is asked for.

    Args:
      installed: version by distribution.
      lowest: the oldest version of JAX that will do.

    >>> requirements({"jax": "0.10.1", "jax-cuda12-plugin": "0.10.1"}, "0.10.0")
    ['jax==0.10.1']
    >>> requirements({"jax": "0.7.2", "jax-cuda12-plugin": "0.7.2"}, "0.10.0")
    ['jax[cuda12]>=0.10.0']
    >>> requirements({}, "0.10.0")
    []
    """
    present = installed.get("jax")
    if present is None:
        return []
    if numbers(present) >= numbers(lowest):
        return [f"jax=={present}"]
    extras = [extra for name, extra in PLUGINS.items() if name in installed]
    return [f"{extra}>={lowest}" for extra in extras]


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")[:3] if number.isdigit()]


if __name__ == "__main__":
    found = {dist.name.lower().replace("_", "-"): dist.version for dist in distributions()}
    wanted = ["--editable", f"{CLONE}[experiments]", *requirements(found, lowest_jax())]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
