"""Facts in a compiled program's text: products, large copies, communication."""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

from jax.stages import Compiled

# (shape, operation, the line's rest) of every instruction.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\]")
_LIBRARY_PRODUCT = re.compile(r'custom_call_target="[^"]*(?:matmul|gemm)')
# Devices that take part together: [groups,size], {{0,1},{2,3}}, or, in texts of JAX 0.12, the axes
# of a mesh, mesh['data'=2,'model'=4] {'model'}.
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[(.*?)\] ?\{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'=(\d+)")

# The body of a fusion: only its result reaches memory.
_FUSED = re.compile(r"\bfusion\(.*calls=%?([\w.-]+)")
_COMPUTATION = re.compile(r"^%?([\w.-]+) \(.*\{\n((?:  .*\n)*)\}", re.MULTILINE)

# Operations that only move data. Large ones cost time and memory, and a good head has none.
MOVES = ("copy", "copy-start", "pad", "scatter", "transpose")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that a GPU launches a kernel for, and that a TPU starts one after the other.
LAUNCHED = (
    *("fusion", "custom-call", "dot", "convolution", "reduce", "reduce-window", "sort"),
    *("gather", "scatter", "copy", "transpose", "pad", "concatenate", "convert", "broadcast"),
    *("slice", "dynamic-slice", "dynamic-update-slice", "select-and-scatter", "iota", "select"),
)


class Collective(NamedTuple):
    """One collective of a step, as a device sees it."""

    kind: str
    size: int  # bytes of its result on each device
    devices: int  # that take part together

    @property
    def sent(self) -> float:
        """Bytes that each device sends, around a ring."""
        share = (self.devices - 1) / self.devices
        if self.kind == "all-reduce":
            return 2 * share * self.size
        # The result of a reduce-scatter is one device's part of what is sent around.
        return (self.devices if self.kind == "reduce-scatter" else 1) * share * self.size


class Facts(NamedTuple):
    """Facts of a program that do not depend on the machine's load."""

    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    reused_bytes: int  # of arguments that outputs take the place of
    dots: int  # matrix products in the program's text; a loop's count once
    large_moves: dict[str, int]  # copies and the like, of at least as many elements as asked

    @property
    def needed_bytes(self) -> int:
        """All memory that the program needs on a device."""
        held = self.argument_bytes + self.output_bytes - self.reused_bytes
        return held + self.temporary_bytes


def facts(compiled: Compiled, elements: int) -> Facts:
    """Facts of a program; a move is large from so many elements on."""
    text = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    moves = Counter(
        operation
        for shape, operation, _ in _INSTRUCTION.findall(_without_fused(text))
        if max((size for size, _ in _arrays(shape)), default=0) >= elements
    )
    return Facts(
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        reused_bytes=memory.alias_size_in_bytes,
        dots=dots(text),
        large_moves={name: moves[name] for name in MOVES if moves[name]},
    )


def dots(text: str) -> int:
    """Matrix products in a program's text, those handed to a library included."""
    return sum(
        operation == "dot" or (operation == "custom-call" and bool(_LIBRARY_PRODUCT.search(rest)))
        for _, operation, rest in _INSTRUCTION.findall(text)
    )


def kernels(text: str) -> int:
    """The number of kernels that a program launches; those of a loop's body count once."""
    fused = set(_FUSED.findall(text))
    alone = _COMPUTATION.sub(lambda body: "" if body[1] in fused else body[0], text)
    return sum(operation in LAUNCHED for _, operation, _ in _INSTRUCTION.findall(alone))


def collectives(compiled: Compiled, devices: int) -> list[Collective]:
    """The collectives of a program for so many devices, without those of one device."""
    found = []
    for shape, operation, rest in _INSTRUCTION.findall(compiled.as_text() or ""):
        kind = operation.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        together = _together(rest) or devices
        arrays = _arrays(shape)
        if kind == "all-gather" and operation != kind:
            arrays = arrays[len(arrays) // 2 :]  # the first half are its operands
        if together > 1:
            found.append(Collective(kind, sum(size for _, size in arrays), together))
    return found


def _without_fused(text: str) -> str:
    """The text without what is computed inside a fusion: of its body the result stays."""
    fused = set(_FUSED.findall(text))

    def shorter(body: re.Match) -> str:
        if body[1] not in fused:
            return body[0]
        return "\n".join(line for line in body[2].splitlines() if line.startswith("  ROOT "))

    return _COMPUTATION.sub(shorter, text)


def _together(rest: str) -> int | None:
    """Devices of one of a collective's groups; None if the text says nothing: then all."""
    groups = _GROUPS.search(rest)
    if groups is None:
        return None
    size, first, mesh, axes = groups.groups()
    if size:
        return int(size)
    if first is not None:
        return len(first.split(","))
    sizes = {name: int(value) for name, value in _AXIS.findall(mesh)}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", axes))


def _arrays(shape: str) -> list[tuple[int, int]]:
    """(elements, bytes) of every array of a shape."""
    found = []
    for dtype, sizes in _ARRAY.findall(shape):
        elements = math.prod(map(int, filter(None, sizes.split(","))))
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        found.append((elements, bits // 8 * elements))
    return found
