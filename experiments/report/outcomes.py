"""Results as the report reads them: loaded, checked, grouped by what they share."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.cells import CELLS, CONFIGS
from experiments.store import results as result

Outcome = dict[str, Any]

RESULTS = Path(__file__).parents[1] / "results"
# What every loss may be given of its own, so that runs which differ in these alone stand together.
OF_THE_LOSS = ("pace", "lam", "learning_rate")
NEEDED = {
    "run": ("name", "seed", "status", "reduced", "changes", "config", "data", "device"),
    "tuning": ("config", "best", "candidates"),
    "verification": ("protocol", "pairs", "tested_folds", "config", "metrics", "curve"),
}


class Outcomes(NamedTuple):
    """The results in a folder.

    Attributes:
      runs: of configurations, tested on the test images.
      validated: the same, tested on training images held out.
      tunings: λ by the error on the validation split.
      verifications: of pairs of faces; those that differ in the fold left out stand as one.
    """

    runs: list[Outcome]
    validated: list[Outcome]
    tunings: list[Outcome]
    verifications: list[Outcome]


class Group(NamedTuple):
    """Finished runs that differ in the seed alone."""

    name: str
    changes: dict[str, Any]
    runs: list[Outcome]

    @property
    def reduction(self) -> dict[str, Any]:
        """The changes that runs of several losses share: updates, width, batch."""
        return {n: v for n, v in self.changes.items() if n not in OF_THE_LOSS}

    @property
    def own(self) -> dict[str, Any]:
        """The changes of this loss alone: λ and the learning rate."""
        return {n: v for n, v in self.changes.items() if n in OF_THE_LOSS}


def load_outcomes(out: Path) -> Outcomes:
    """The results in a folder, and of the tunings in its folder tune.

    Raises:
      ValueError: naming the file that holds no result, or the two that hold the same one.
    """
    if not out.is_dir():
        raise ValueError(f"out must be a folder of results, got {out}")
    found: dict[str, list[Outcome]] = {kind: [] for kind in NEEDED}
    tunings = [o | {"file": f"tune/{o['file']}"} for o in result.load_all(out / "tune")]
    # A file of the folder tune itself is in both lists.
    for outcome in {o["file"]: o for o in [*result.load_all(out), *tunings]}.values():
        kind = outcome.get("kind", "run")
        if not isinstance(kind, str):
            raise ValueError(f"{out / outcome['file']} must hold a result, got kind {kind!r}")
        if kind in NEEDED:  # benchmarks have tables of their own
            _check(out, kind, outcome)
            found[kind].append(outcome)
    _check_different(out, found["run"], ("name", "changes", "seed"))
    _check_different(out, found["verification"], ("config", "tested_folds", "protocol"))
    validated = [o for o in found["run"] if "validation" in o["changes"]]
    runs = [o for o in found["run"] if o not in validated]
    return Outcomes(runs, validated, found["tuning"], over_folds(found["verification"]))


def over_folds(verifications: Sequence[Outcome]) -> list[Outcome]:
    """One for all folds, where every fold was tested with a network of its own; else as they are.

    Numbers and curve are means over the folds, since scores of different networks do not compare;
    ``networks`` says of how many.
    """
    alike = defaultdict(list)
    for outcome in verifications:
        config = {n: v for n, v in outcome["config"].items() if n != "left_out_fold"}
        went_on = "--init-from" in (outcome.get("training") or {}).get("command", "")
        alike[json.dumps([outcome["protocol"], config, went_on], sort_keys=True)].append(outcome)
    return [same[0] if len(same) == 1 else _mean_of_folds(same) for same in alike.values()]


def _mean_of_folds(same: Sequence[Outcome]) -> Outcome:
    metrics, curves = ([outcome[name] for outcome in same] for name in ("metrics", "curve"))
    accuracy = [value for seen in metrics for value in seen["fold_accuracy"]]

    def mean(name: str) -> float:
        return statistics.mean(seen[name] for seen in metrics)

    return same[0] | {
        "networks": len(same),
        "tested_folds": sorted(fold for outcome in same for fold in outcome["tested_folds"]),
        "pairs": sum(outcome["pairs"] for outcome in same),
        "people_trained_on": min(outcome["people_trained_on"] for outcome in same),
        "metrics": {
            "accuracy": statistics.mean(accuracy),
            "standard_error": statistics.stdev(accuracy) / math.sqrt(len(accuracy)),
            "auc": mean("auc"),
            "equal_error_rate": mean("equal_error_rate"),
            "tar_at_far": {
                far: statistics.mean(seen["tar_at_far"][far] for seen in metrics)
                for far in metrics[0]["tar_at_far"]
            },
        },
        "curve": {
            name: [statistics.mean(at) for at in zip(*(c[name] for c in curves), strict=True)]
            for name in curves[0]
        },
    }


def _check(out: Path, kind: str, outcome: Outcome) -> None:
    file = out / outcome["file"]
    missing = [name for name in NEEDED[kind] if name not in outcome]
    if kind == "run" and outcome.get("status") == "finished":
        missing += [name for name in ("train", "test", "curves") if name not in outcome]
    if missing:
        raise ValueError(f"{file} must hold a result; it has no {', '.join(missing)}")
    if kind == "run" and outcome["name"] not in CONFIGS:
        raise ValueError(f"{file} is of no configuration that list prints: {outcome['name']!r}")


def _check_different(out: Path, outcomes: Sequence[Outcome], names: Sequence[str]) -> None:
    files: dict[str, str] = {}
    for outcome in outcomes:
        key = json.dumps([outcome[name] for name in names], sort_keys=True)
        first = files.setdefault(key, outcome["file"])
        if first != outcome["file"]:
            raise ValueError(
                f"{out / first} and {out / outcome['file']} hold the same run, equal in "
                f"{', '.join(names)}; remove one"
            )


def grouped(runs: Sequence[Outcome]) -> list[Group]:
    """Finished runs by configuration and changes, in the order of the cells; short runs first.

    Raises:
      ValueError: if seeds saw different data.
    """
    groups: dict[str, Group] = {}
    for outcome in runs:
        if outcome["status"] == "finished":
            key = json.dumps([outcome["name"], outcome["changes"]], sort_keys=True)
            group = groups.setdefault(key, Group(outcome["name"], outcome["changes"], []))
            group.runs.append(outcome)
    order = list(CELLS)

    def rank(group: Group) -> tuple[Any, ...]:
        config = CONFIGS[group.name]
        steps, width = (group.changes.get(n, getattr(config, n)) for n in ("steps", "width"))
        return order.index(group.name), steps, width, len(group.changes), text(group)

    for group in groups.values():
        group.runs.sort(key=lambda outcome: outcome["seed"])
        check_same_data(group.runs)
    return sorted(groups.values(), key=rank)


def by_name(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found = defaultdict(list)
    for group in groups:
        found[group.name].append(group)
    return dict(found)


def check_same_data(runs: Sequence[Outcome]) -> None:
    """Seeds are averaged only if they saw the same data."""
    if len({outcome["data"]["fingerprint"] for outcome in runs}) > 1:
        files = ", ".join(outcome["file"] for outcome in runs)
        raise ValueError(f"these runs saw different data, whose mean says nothing: {files}")


def text(group: Group) -> str:
    """Where runs depart from their configuration: 200 updates, width 0.25, λ minimum 5."""
    return ", ".join(filter(None, (words(group.reduction), own_words(group.name, group.own))))


def words(changes: dict[str, Any]) -> str:
    """Changes in words, updates and width first."""
    first = {n: changes[n] for n in ("steps", "width", "batch") if n in changes}
    return ", ".join(_word(name, value) for name, value in (first | changes).items())


def own_words(name: str, own: dict[str, Any]) -> str:
    """What a loss of a configuration has of its own; of λ the constants that differ."""
    named = CONFIGS[name].lam._asdict()
    said = []
    if "pace" in own:
        said.append(f"λ {own['pace']}")
    if "lam" in own:
        constants = [f"{c} {v:g}" for c, v in own["lam"].items() if v != named.get(c)]
        said.append(f"λ {', '.join(constants)}")
    if "learning_rate" in own:
        said.append(f"learning rate {own['learning_rate']:g}")
    return ", ".join(said)


def _word(name: str, value: Any) -> str:
    if name == "steps":
        return f"{value:,} updates"
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name.replace('_', ' ')} {value}"


def seeds_words(runs: Sequence[Outcome]) -> str:
    """seed 0; seeds 0 to 2; seeds 0, 2."""
    seeds = sorted({outcome["seed"] for outcome in runs})
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"


def errors(runs: Sequence[Outcome], split: str) -> list[float]:
    return [outcome[split]["error"] for outcome in runs]


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; without the latter for one value, empty for none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def counted(values: Sequence[float]) -> str:
    """Mean ± standard deviation (number of seeds); empty for none."""
    return f"{spread(values)} ({len(values)})" if values else ""
