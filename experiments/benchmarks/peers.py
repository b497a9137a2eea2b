"""The same head in PyTorch, timed in a process of its own.

Imports nothing of this project and no JAX, so that any Python with torch can run it:

    python peers.py versions
    python peers.py OPERANDS.npz MARGIN REPETITIONS ARM

prints JSON: the versions of what is installed; an arm's loss, the seconds of each repetition, and
by how many bytes the process grew at its first step, gradients included.
"""

import functools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("torch", "pytorch-metric-learning")
SOFTMAX = "torch softmax"
# pytorch-metric-learning's LargeMarginSoftmaxLoss, and its ArcFaceLoss and CosFaceLoss.
LARGE_MARGIN = "pytorch-metric-learning"
ARCFACE, COSFACE = f"{LARGE_MARGIN}, ArcFace", f"{LARGE_MARGIN}, CosFace"
FAMILY = {ARCFACE: "ArcFace", COSFACE: "CosFace"}


def arms(installed: Iterable[str]) -> tuple[str, ...]:
    """Names of the losses that can be timed with the installed packages."""
    if LARGE_MARGIN in installed:
        return SOFTMAX, LARGE_MARGIN, ARCFACE, COSFACE
    return (SOFTMAX,)


def main(operands: Path, margin: int, repetitions: int, arm: str) -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    with np.load(operands, allow_pickle=False) as file:
        features, kernel = (torch.from_numpy(file[name]) for name in ("features", "kernel"))
        labels = torch.from_numpy(file["labels"]).long()
    features.requires_grad_()
    build = softmax if arm == SOFTMAX else functools.partial(of_metric_learning, arm)
    kernel, loss = build(kernel, margin)

    def step() -> float:
        features.grad = kernel.grad = None
        value = loss(features, labels)
        value.backward()
        return float(value)

    step_on_little(build, margin)
    before = peak_bytes()
    value = step()
    growth = peak_bytes() - before
    step()
    seconds = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    print(json.dumps({"loss": value, "seconds": seconds, "growth_bytes": growth}))


def softmax(kernel: Any, margin: int) -> tuple[Any, Callable[..., Any]]:
    import torch

    kernel = torch.nn.Parameter(kernel)
    return kernel, lambda x, y: torch.nn.functional.cross_entropy(x @ kernel, y)


def of_metric_learning(arm: str, kernel: Any, margin: int) -> tuple[Any, Callable[..., Any]]:
    import torch
    from pytorch_metric_learning import losses

    size = kernel.shape[1], kernel.shape[0]
    if arm == ARCFACE:  # its margin is in degrees
        loss = losses.ArcFaceLoss(*size, margin=math.degrees(0.5), scale=64)
    elif arm == COSFACE:
        loss = losses.CosFaceLoss(*size, margin=0.35, scale=64)
    else:
        loss = losses.LargeMarginSoftmaxLoss(*size, margin=margin, scale=1)
    loss.W = torch.nn.Parameter(kernel)
    return loss.W, loss


def step_on_little(build: Callable[..., Any], margin: int) -> None:
    """Starts the library's threads, which would count as growth."""
    import torch

    _, loss = build(torch.randn(8, 16), margin)
    loss(torch.randn(32, 8).requires_grad_(), torch.zeros(32).long()).backward()


def peak_bytes() -> int:
    if (status := Path("/proc/self/status")).exists():
        # getrusage would count what the parent held when this process began.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed, by name."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions(PACKAGES) if find_spec("torch") else {}))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
