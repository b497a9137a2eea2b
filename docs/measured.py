"""The guide's numbers, read from the committed results when the site is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLONE = Path(__file__).parents[1]
BENCH = CLONE / "experiments" / "results" / "bench"
STACKS = CLONE / "stacks"
MANY_CLASSES = [512, 256, 102400]  # batch, features, classes

# The arms that a user chooses among, by their names in `bench head`, and what to write for each.
PLANS = {
    "optax softmax": "Optax's softmax cross-entropy, no margin",
    "loss_sum, one-shot": "`lsoftmax_loss_sum`, one shot",
    "loss_sum, row blocks": "`lsoftmax_loss_sum`, `row_block`",
    "loss_sum, class blocks": "`lsoftmax_loss_sum`, `class_block`",
    "loss_sum, class blocks, stored": "the same, `keep_exponentials=True`",
    "lsoftmax_logits, optax": "`lsoftmax_logits` and Optax's cross-entropy",
    "optax softmax, optax SGD": "Optax's softmax cross-entropy and SGD, no margin",
    "loss_sum, one-shot, optax SGD": "`lsoftmax_loss_sum` and Optax's SGD",
    "lsoftmax_sgd": "`lsoftmax_sgd`",
}


def newest(pattern: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The latest of the wanted results among the files that match a pattern."""
    results = [json.loads(file.read_text()) for file in BENCH.glob(pattern)]
    return max(filter(wanted, results), key=lambda result: str(result["date"]))


def many_classes_plans() -> str:
    """A table: time beside Optax and temporary memory of every plan at many classes."""

    def on_cpu(result: dict[str, Any]) -> bool:
        shapes = [measured["shape"] for measured in result["shapes"]]
        return result["device"].startswith("cpu") and MANY_CLASSES in shapes

    result = newest("head-cpu-f32-*.json", on_cpu)
    (measured,) = (one for one in result["shapes"] if one["shape"] == MANY_CLASSES)
    arms = {arm["arm"]: arm for arm in measured["arms"]}
    rows = [
        f"| {words} | {arms[name]['ratio'][0]:.2f} | {arms[name]['temporary_bytes'] / 1e6:.1f} |"
        for name, words in PLANS.items()
        if name in arms  # an arm is missing where it did not fit the machine's memory
    ]
    return "\n".join(["| loss and update | time | temporary MB |", "|---|--:|--:|", *rows])


def million_classes() -> str:
    """A sentence: memory and time of an update at a million classes."""
    result = newest("scale-cpu-1000000-*.json", lambda result: True)
    config = result["config"]
    state, temporary, peak = (
        f"{result[f'{name}_bytes'] / 1e9:.3g} GB" for name in ("state", "temporary", "peak")
    )
    return (
        f"at a million classes of {config['dim']} features and a batch of {config['batch']} they "
        f"take {state}, everything temporary {temporary}, and the process {peak} at its peak. "
        f"An update took {result['seconds_per_step']:.0f} s on two CPU cores."
    )


def runs(file: str, columns: list[str]) -> str:
    """A table: the recorded runs of a JSON file in stacks/, with date and commit."""
    rows = json.loads((STACKS / file).read_text())
    lines = ["| " + " | ".join([*columns, "run"]) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [str(row.get(column, "")) for column in columns]
        lines.append("| " + " | ".join([*cells, f"{row['date']}, {row['commit']}"]) + " |")
    return "\n".join(lines)


def stacks() -> str:
    """A table: how many tests passed on each stack."""
    counts = ["passed", "failed", "skipped", "seconds"]
    return runs("results.json", ["stack", "python", "jax", "flax", *counts, "load"])


def notebooks() -> str:
    """A table: how long each notebook took with the packages of Colab's runtime."""
    seconds = ["installing", "seconds"]
    return runs("notebooks.json", ["notebook", "python", "jax", "flax", *seconds, "load"])
