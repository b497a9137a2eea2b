"""How far one eager call of `head.loss` travels before the first matrix product.

`python -m tests.call_profile` prints the files, frames and types of the library on the way. Only
the first call of a shape runs this Python: later ones run what was compiled.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

import lsoftmax_jax
from lsoftmax_jax import nnx

HOME = Path(lsoftmax_jax.__file__).parent


class Profile(NamedTuple):
    """What of the library a call touches before the first product."""

    files: list[str]  # entered
    frames: list[str]  # functions on the stack at the first product
    functions: list[str]  # entered
    types: list[str]  # NamedTuples and dataclasses that were made


def profile_of(call: Any) -> Profile:
    entered: dict[str, None] = {}
    files: dict[str, None] = {}
    types: dict[str, None] = {}
    stack: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        if event == "return":
            return
        name = frame.f_code.co_qualname
        if event == "call" and name == "dot_general":
            while frame := frame.f_back:
                if HOME in Path(frame.f_code.co_filename).parents:
                    stack.append(frame.f_code.co_qualname)
            sys.setprofile(None)
            return
        if event != "call":
            return
        path = Path(frame.f_code.co_filename)
        if HOME in path.parents:
            files[str(path.relative_to(HOME))] = None
            entered[name] = None
        # A NamedTuple's __new__ is a lambda of `_cls`; a dataclass has an __init__.
        made = frame.f_locals.get("_cls")
        if name.endswith("__init__"):
            made = type(frame.f_locals.get("self"))
        ours = getattr(made, "__module__", "").startswith("lsoftmax_jax")
        if ours and (hasattr(made, "_fields") or dataclasses.is_dataclass(made)):
            types[made.__name__] = None

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Profile(list(files), stack[::-1], list(entered), list(types))


def main() -> None:
    head = nnx.LSoftmaxDense(8, 10, rngs=flax_nnx.Rngs(0))
    features, labels = jnp.ones((4, 8)), jnp.arange(4)
    jax.block_until_ready(features)
    for name, values in profile_of(lambda: head.loss(features, labels))._asdict().items():
        print(f"{len(values):3} {name}: {', '.join(values)}")


if __name__ == "__main__":
    main()
