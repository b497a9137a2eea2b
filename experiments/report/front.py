"""The tables of the clone's README: what a margin gains, what it costs, the paper's numbers."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import arms, convergence, open_set, peers
from experiments.benchmarks.tables import markdown
from experiments.paper.cells import CELLS
from experiments.report.outcomes import Group, full_runs
from experiments.report.tables import DATA, marked

# Softmax, the default rule for λ, more margin, a schedule, and the whole margin from the start.
WAYS = (
    *("softmax", "`self_paced()`, m = 4", "`self_paced(1.0)`"),
    *("`margin_schedule(steps)`", "λ = 0"),
)
MARGINS = (
    *("softmax", "softmax, decay 0.002", "self_paced()"),
    *("released, minimum 10", "NormFace(scale=16)"),
)


def tables(bench: Path, groups: Sequence[Group]) -> dict[str, str]:
    """The tables by the name in their marker; empty where the result is missing.

    Args:
      bench: the folder of the benchmarks' results.
      groups: all runs.
    """
    return {
        "training": trained(newest(bench, "convergence-cpu.json")),
        "unseen": unseen(newest(bench, "open-set-cpu.json")),
        "cost": cost(heads(bench), newest(bench, "step-cpu-*.json")),
        "paper": paper(groups),
    }


def newest(bench: Path, pattern: str) -> dict[str, Any]:
    """The latest result of a pattern; empty if there is none."""
    found = dated(bench, pattern)
    return found[-1] if found else {}


def dated(bench: Path, pattern: str) -> list[dict[str, Any]]:
    """The results of a pattern, the latest last."""
    found = [json.loads(file.read_text()) | {"file": file.name} for file in bench.glob(pattern)]
    return sorted(found, key=lambda result: str(result["date"]))


def heads(bench: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The latest CPU result of `bench head` for each size, and its entry; few classes first."""
    latest = {
        tuple(entry["shape"]): (result, entry)
        for result in dated(bench, "head-cpu-f32-*.json")
        for entry in result["shapes"]
    }
    return [latest[shape] for shape in sorted(latest, key=lambda shape: (shape[2], shape))]


def linked(text: str, result: dict[str, Any]) -> str:
    """A link to a result."""
    return f"[{text}](experiments/results/bench/{result['file']})"


def said(result: dict[str, Any]) -> str:
    """Where and when a result was measured, with its link."""
    measured = result["device"], result["date"][:10], str(result["commit"])[:7]
    return ", ".join([*measured, linked("result", result)])


def trained(result: dict[str, Any]) -> str:
    """Test errors over all settings, a row a way to choose λ."""
    if not result:
        return ""
    header, rule, *rows = convergence.summary_table(result["settings"]).splitlines()
    kept = [row for row in rows if row.split(" | ")[0].removeprefix("| ") in WAYS]
    return "\n".join([header.replace("λ", linked("λ", result)), rule, *kept])


def unseen(result: dict[str, Any]) -> str:
    """EER of classes that training never saw beside the error of trained ones."""
    if not result:
        return ""
    runs, rows = result["runs"], []
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    there = {(run["task"], run["policy"]) for run in runs}
    for policy in MARGINS:
        if all(run["policy"] != policy for run in runs):
            continue
        means = (
            [f"{open_set.over(runs, task, policy, of).mean():.1f}" for of in ("error", "eer")]
            if (task, policy) in there
            else []
            for task in tasks
        )
        rows.append([open_set.shown(policy), *map(" / ".join, means)])
    header = [linked("error / EER, %", result), *(open_set.TASKS[task].title for task in tasks)]
    return markdown(header, rows)


def cost(sizes: Sequence[tuple[dict[str, Any], dict[str, Any]]], steps: dict[str, Any]) -> str:
    """Time and memory beside Optax's softmax, a row a size; a sentence on whole steps."""
    if not sizes:
        return ""
    rows = []
    for _, entry in sizes:
        found = {row["arm"]: row for row in entry["arms"]}
        shape = ", ".join(map(str, entry["shape"]))
        if arms.HEAD not in found:
            rows.append([f"{shape}, `lsoftmax_sgd`", *_costs(found.get(arms.FUSED_SGD)), *3 * [""]])
            continue
        rows.append(
            [
                shape,
                *_costs(found[arms.HEAD], found.get(peers.LARGE_MARGIN)),
                *_costs(found.get("ArcFace"), found.get(peers.ARCFACE)),
            ]
        )
    header = ["batch, features, classes"]
    for margin in ("m = 4", "ArcFace"):
        header += [f"{margin}: time", "memory", "theirs"]
    lines, measured = [markdown(header, rows), ""], defaultdict(list)
    for result, entry in sizes:
        measured[said(result)].append(f"{entry['shape'][2]:,} classes")
    # A result may have only some of the sizes.
    most = max(measured, key=lambda source: len(measured[source]))
    others = (f"{', '.join(of)}: {source}" for source, of in measured.items() if source != most)
    sources = "; ".join([most, *others])
    if steps:
        ratios = []
        for entry in steps["configurations"]:
            (arm,) = (arm for arm in entry["arms"] if arm["arm"] == "margin")
            name = DATA[entry["configuration"].partition("-")[0]]
            ratios.append(f"{name} {arm['ratio'][0]:.2f} x (batch {entry['batch']})")
        sources += f". A training step with m = 4: {', '.join(ratios)}; {said(steps)}"
    return "\n".join([*lines, f"*{sources}*"])


def _costs(ours: dict[str, Any] | None, theirs: dict[str, Any] | None = None) -> list[str]:
    """Our time and memory, and the time of pytorch-metric-learning, beside Optax's softmax."""
    peer = "" if theirs is None else f"{theirs['ratio'][0]:.1f} x"
    if ours is None:
        return ["", "", peer]
    memory = ours["memory_ratio"]
    digits = 2 if memory >= 0.005 else 3
    return [f"{ours['ratio'][0]:.2f} x", f"{memory:.{digits}f} x", peer]


def paper(groups: Sequence[Group]) -> str:
    """The paper's error / ours, a row a data set that has a full run."""
    full, rows = full_runs(groups), []
    for data in ("mnist", "cifar10", "cifar10plus", "cifar100"):
        names = [f"{data}-{loss}" for loss in ("softmax", "m2", "m3", "m4")]
        if any(full[name].runs for name in names):
            papers = [marked(CELLS[name].reported, CELLS[name].standing) for name in names]
            both = zip(papers, (full[name].error for name in names), strict=True)
            rows.append([DATA[data], *(f"{paper} / {ours}".strip() for paper, ours in both)])
    return markdown(["", "softmax", "m = 2", "m = 3", "m = 4"], rows)
