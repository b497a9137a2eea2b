"""Print each lower bound that a pyproject.toml declares as a pin.

python scripts/lowest.py pyproject.toml > pins.txt
"""

import itertools
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Never installed by the suite.
UNTESTED_EXTRAS = {"aot-gpu", "aot-tpu", "cuda", "mutation", "onnx", "peers", "prepare", "tpu"}


def lower_bound(requirement: Requirement) -> str:
    """The version behind the requirement's ``>=``."""
    bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement}: expected one lower bound (>=), got {len(bounds)}")
    return bounds[0]


def pins(project: dict) -> list[str]:
    """``name==version`` of every dependency, tested extras included, at its lower bound."""
    extras = project["optional-dependencies"].items()
    tested = [requirements for extra, requirements in extras if extra not in UNTESTED_EXTRAS]
    listed = map(Requirement, itertools.chain(project["dependencies"], *tested))
    own_name = canonicalize_name(project["name"])
    others = [r for r in listed if canonicalize_name(r.name) != own_name]
    return [f"{r.name}=={lower_bound(r)}" for r in others]


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        print("\n".join(pins(tomllib.load(file)["project"])))
