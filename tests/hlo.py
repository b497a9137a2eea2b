"""Facts of a compiled program: temporary memory, products, copies of large arrays."""

import math
import re
from typing import NamedTuple

from jax.stages import Compiled

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
FUSED = re.compile(r"\bfusion\(.*calls=%?([\w.-]+)")
BODY = re.compile(r"^%?([\w.-]+) \(.*\{\n((?:  .*\n)*)\}", re.MULTILINE)
MOVES = {"copy", "copy-start", "pad", "scatter", "transpose"}


class Facts(NamedTuple):
    """Facts that do not depend on the machine's load."""

    temporary_bytes: int
    reused_bytes: int  # of arguments whose memory the outputs reuse
    dots: int  # matrix products; a product in a loop counts once
    large_moves: list[str]  # MOVES of at least the given number of elements


def facts(compiled: Compiled, elements: int) -> Facts:
    text, memory = compiled.as_text(), compiled.memory_analysis()
    fused = set(FUSED.findall(text))
    # A move inside a fusion never reaches memory.
    outside = BODY.sub(lambda body: "" if body[1] in fused else body[0], text)
    return Facts(
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        sum(is_product(kind, rest) for _, kind, rest in INSTRUCTION.findall(text)),
        [
            kind
            for shape, kind, _ in INSTRUCTION.findall(outside)
            if kind in MOVES and largest(shape) >= elements
        ],
    )


def is_product(kind: str, rest: str) -> bool:
    library = re.search(r'custom_call_target="[^"]*(?:matmul|gemm)', rest)
    return kind == "dot" or (kind == "custom-call" and library is not None)


def largest(shape: str) -> int:
    """Elements of the largest array of a shape."""
    sizes = re.findall(r"\w\[([\d,]*)\]", shape)
    return max((math.prod(map(int, filter(None, size.split(",")))) for size in sizes), default=0)
