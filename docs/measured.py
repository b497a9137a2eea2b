"""The guide's numbers, read from the committed results when the site is built."""

import json
from pathlib import Path
from typing import Any

from experiments.benchmarks import convergence, open_set
from experiments.benchmarks.tables import markdown
from experiments.report import front, tables
from experiments.report.outcomes import RESULTS, load_outcomes

CLONE = Path(__file__).parents[1]
BENCH = CLONE / "experiments" / "results" / "bench"
EXAMPLES = CLONE / "experiments" / "results" / "examples"
STACKS = CLONE / "stacks"
# Batch, features, classes.
MANY_CLASSES = [512, 256, 102_400]
MILLION_CLASSES = [512, 256, 1_000_000]

UNSEEN_NUMBERS = {
    "error": "error, %",
    "eer": "EER, %",
    "tar_at_1e-2": "TAR at FAR 1e-2, %",
    "rank_1": "rank 1, %",
    "within": "within, °",
    "between": "between, °",
    "share": "share, %",
}

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


def mean(numbers: list[float], digits: int = 1) -> str:
    return f"{sum(numbers) / len(numbers):.{digits}f}"


def head_at(shape: list[int]) -> dict[str, dict[str, Any]]:
    """The arms of the latest `bench head` on a CPU that has a shape, by their names."""
    (entry,) = (entry for _, entry in front.heads(BENCH) if entry["shape"] == shape)
    return {arm["arm"]: arm for arm in entry["arms"]}


def many_classes_plans() -> str:
    """A table: time beside Optax and temporary memory of every plan at many classes."""
    arms = head_at(MANY_CLASSES)
    rows = [
        [words, f"{arms[name]['ratio'][0]:.2f}", f"{arms[name]['temporary_bytes'] / 1e6:.1f}"]
        for name, words in PLANS.items()
        if name in arms  # an arm is missing where it did not fit the machine's memory
    ]
    return markdown(["loss and update", "time", "temporary MB"], rows)


def million_classes() -> str:
    """A sentence: memory and time of an update at a million classes."""
    batch, dim, classes = MILLION_CLASSES
    arms = head_at(MILLION_CLASSES)
    ours, plain = arms["lsoftmax_sgd"], arms["optax softmax, optax SGD"]
    ours_mb, plain_mb = (f"{arm['temporary_bytes'] / 1e6:,.0f} MB" for arm in (ours, plain))
    return (
        f"at a million classes of {dim} features they take {8 * dim * classes / 1e9:.1f} GB. At a "
        f"batch of {batch}, everything temporary takes {ours_mb}, where softmax and SGD of Optax "
        f"take {plain_mb}. An update took {ours['milliseconds'][0] / 1e3:.1f} s on two CPU cores, "
        f"{ours['ratio'][0]:.2f} of the time of Optax."
    )


def unseen() -> str:
    """A table a task: what every margin reaches on classes that training sees and never sees."""
    found = json.loads((BENCH / "open-set-cpu.json").read_text())["runs"]
    return open_set.results_table(found, UNSEEN_NUMBERS)


def trained() -> dict[str, str]:
    """Which λ trains: over all settings, by setting, and for rare classes."""
    found, scaled, normed, both = (
        json.loads((BENCH / f"convergence{flags}-cpu.json").read_text())["settings"]
        for flags in ("", "-scaled", "-batch-norm", "-scaled-batch-norm")
    )
    return {
        "convergence": convergence.summary_table(found),
        "convergence_settings": convergence.settings_table(found),
        "convergence_rarest": convergence.rarest_table(found),
        "convergence_scaled": convergence.summary_table(scaled),
        "convergence_scaled_settings": convergence.settings_table(scaled),
        "convergence_batch_norm": convergence.summary_table(normed),
        "convergence_batch_norm_settings": convergence.settings_table(normed),
        "convergence_scaled_batch_norm": convergence.summary_table(both),
        "convergence_scaled_batch_norm_settings": convergence.settings_table(both),
    }


def every_run() -> dict[str, str]:
    """The report's tables that the READMEs do not have."""
    found = tables.sections(load_outcomes(RESULTS))
    return {
        "runs_against_softmax": found[tables.AGAINST],
        "runs_every": found[tables.ALL],
        "runs_faces": found[tables.VERIFIED],
        "runs_validated": found[tables.VALIDATED],
        "runs_diverged": found[tables.DIVERGED],
    }


def partial_fc() -> str:
    """A table: errors by the part of the classes that every update samples."""
    found = json.loads((EXAMPLES / "partial_fc.json").read_text())["runs"]
    margins, rows = list(dict.fromkeys(run["margin"] for run in found)), []
    for part, corrected in dict.fromkeys((run["classes"], run["corrected"]) for run in found):
        row = [f"{100 * part:.0f} %" + ("" if corrected else ", uncorrected")]
        for margin in margins:
            arm = margin, part, corrected
            chosen = [
                run for run in found if (run["margin"], run["classes"], run["corrected"]) == arm
            ]
            row += [mean([run[of] for run in chosen], 2) for of in ("error", "eer")]
        rows.append(row)
    names = [f"`{margin}`, {of}, %" for margin in margins for of in ("error", "EER")]
    seeds = len({run["seed"] for run in found})
    return markdown([f"classes (seeds: {seeds})", *names], rows)


def small_cnn() -> str:
    """A table: the errors of the small CNN of examples/, a row a data set and way to choose λ."""
    files = sorted(EXAMPLES.glob("small_cnn*.json"), reverse=True)  # right labels first
    found = [run for file in files for run in json.loads(file.read_text())["runs"]]
    rows = []
    kinds = dict.fromkeys((run["data"], run["wrong"], run["part"], run["policy"]) for run in found)
    for data, wrong, part, policy in kinds:
        kind = data, wrong, part, policy
        chosen = [
            run for run in found if (run["data"], run["wrong"], run["part"], run["policy"]) == kind
        ]
        title = f"{data.upper()}, {part}" + (f", {100 * wrong:.0f} % wrong labels" if wrong else "")
        tests = ", ".join(f"{run['test']:.1f}" for run in chosen)
        numbers = [mean([run[of] for run in chosen]) for of in ("train", "test")]
        share = mean([run["share"][-1] for run in chosen], 3)
        rows.append([title, policy, *numbers, tests, share])
    header = ["data", "λ", "training error, %", "test error, %", "of each seed", "share at the end"]
    return markdown(header, rows)


def runs(file: str, columns: list[str]) -> str:
    """A table: the recorded runs of a JSON file in stacks/, with date and commit."""
    rows = json.loads((STACKS / file).read_text())
    cells = [
        [*(str(row.get(column, "")) for column in columns), f"{row['date']}, {row['commit']}"]
        for row in rows
    ]
    return markdown([*columns, "run"], cells)


def stacks() -> str:
    """A table: how many tests passed on each stack."""
    counts = ["passed", "failed", "skipped", "seconds"]
    return runs("results.json", ["stack", "python", "jax", "flax", *counts, "load"])


def notebooks() -> str:
    """A table: how long each notebook took with the packages of Colab's runtime."""
    seconds = ["installing", "seconds"]
    return runs("notebooks.json", ["notebook", "python", "jax", "flax", *seconds, "load"])
