"""Results as the report reads them: loaded, checked, grouped by what they share."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.paper.cells import CONFIGS, changes_of
from experiments.paper.config import Config
from experiments.paper.style import LINES, loss_name
from experiments.run.loop import RUNS
from experiments.store import results as result
from experiments.store.claims import differing

Outcome = dict[str, Any]

RESULTS = Path(__file__).parents[1] / "results"
# Each loss may have its own values of these: runs that differ in these fields alone stand together.
OF_THE_LOSS = ("pace", "strength", "lam", "learning_rate", "weight_decay", "scale")
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
      verifications: of pairs of faces; those of one recipe are merged over folds and seeds.
    """

    runs: list[Outcome]
    validated: list[Outcome]
    tunings: list[Outcome]
    verifications: list[Outcome]


class Group(NamedTuple):
    """Finished runs of a configuration, changed alike, that differ in the seed alone."""

    name: str
    changes: dict[str, Any]
    runs: Sequence[Outcome]

    @property
    def data(self) -> str:
        """The row of the paper's tables: the part of the name before the loss."""
        return self.name.rpartition("-")[0]

    @property
    def loss(self) -> str:
        """The name in `style.LOSSES` of the configuration's loss."""
        named = CONFIGS[self.name]
        return loss_name(named.family, named.margin, named.hinge)

    @property
    def reduction(self) -> dict[str, Any]:
        """The changes that runs of several losses share: updates, width, batch, augmentation."""
        return {n: v for n, v in self.changes.items() if n not in OF_THE_LOSS}

    @property
    def own(self) -> dict[str, Any]:
        """The changes of this loss alone: λ, learning rate, weight decay, scale."""
        return {n: v for n, v in self.changes.items() if n in OF_THE_LOSS}

    @property
    def lam_words(self) -> str:
        """What decides λ; empty without a margin."""
        if self.loss in ("softmax", "hinge"):
            return ""
        pace = self.of("pace")
        if pace != "annealed":
            lead = f"λ by lead, strength {self.of('strength'):g}"
            # The earlier rule, self-paced, chose one λ for a batch.
            said = {"lead": lead, "none": "λ = 0", "self-paced": "λ self-paced by batch"}
            return said.get(pace, f"λ {pace}")
        named = CONFIGS[self.name].lam._asdict()
        lam = named | self.own.get("lam", {})
        if lam["base"] == lam["minimum"] == 0:
            return "λ = 0"
        others = [f"{c} {v:g}" for c, v in lam.items() if c != "minimum" and v != named[c]]
        return ", ".join([f"λ annealed to {lam['minimum']:g}", *others])

    @property
    def line(self) -> str:
        """The line of the group in a figure, by what decides λ."""
        return LINES[self.of("pace")] if self.lam_words else "-"

    @property
    def own_words(self) -> str:
        """What decides λ, and what else this loss has of its own."""
        return ", ".join(filter(None, [self.lam_words, words(self.own)]))

    @property
    def text(self) -> str:
        """The changes to the configuration in words: 200 updates, width 0.25, λ annealed to 5."""
        return ", ".join(filter(None, (self.reduced_by(), self.own_words)))

    @property
    def error(self) -> str:
        """On the test images: mean ± standard deviation (number of seeds); empty without runs."""
        return counted(self.errors("test"))

    @property
    def entry(self) -> str:
        """The error with λ, weight decay, and what else tells it from the entry beside it."""
        own = words({n: v for n, v in self.own.items() if n != "weight_decay"})
        said = [self.lam_words, own, f"decay {self.of('weight_decay'):g}"]
        return f"{self.error}: {', '.join(filter(None, said))}"

    @property
    def devices(self) -> str:
        return ", ".join(sorted({outcome["device"] for outcome in self.runs}))

    def reduced_by(self, without: str = "") -> str:
        """The reduction in words, without that of one name."""
        return words({n: v for n, v in self.reduction.items() if n != without})

    def errors(self, split: str) -> list[float]:
        return [outcome[split]["error"] for outcome in self.runs]

    def of(self, field: str) -> Any:
        """The value of a field in the configuration of these runs."""
        return self.changes.get(field, getattr(CONFIGS[self.name], field))


def load_outcomes(out: Path | None = None) -> Outcomes:
    """The results in a folder, and of the tunings in its folder tune.

    Args:
      out: the folder. By default the results of the clone, and those that `train` writes into
        the folder runs; of two files with one name the latter counts.

    Raises:
      ValueError: naming the file that holds no result, or the two that hold the same one.
    """
    folders = [out] if out else [RESULTS, *filter(Path.is_dir, [RUNS])]
    found: dict[str, list[Outcome]] = {kind: [] for kind in NEEDED}
    read: dict[str, Outcome] = {}
    files: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"out must be a folder of results, got {folder}")
        tunings = [o | {"file": f"tune/{o['file']}"} for o in result.load_all(folder / "tune")]
        # Both lists have the files that lie directly in the folder tune.
        read |= {outcome["file"]: outcome for outcome in [*result.load_all(folder), *tunings]}
        files |= {name: folder / name for name in read if (folder / name).exists()}
    for name, outcome in read.items():
        kind = outcome.get("kind", "run")
        if not isinstance(kind, str):
            raise ValueError(f"{files[name]} must hold a result, got kind {kind!r}")
        if kind in NEEDED:  # benchmarks have tables of their own
            _check(files[name], kind, outcome)
            found[kind].append(outcome)
    _check_different(files, found["run"], ("name", "changes", "seed"))
    of_pairs = "config", "tested_folds", "protocol", "verified"
    _check_different(files, found["verification"], of_pairs)
    validated = [o for o in found["run"] if "validation" in o["changes"]]
    runs = [o for o in found["run"] if o not in validated]
    return Outcomes(runs, validated, found["tuning"], over_seeds(over_folds(found["verification"])))


def over_folds(verifications: Sequence[Outcome]) -> list[Outcome]:
    """Merges the verifications of one recipe whose folds were tested with networks of their own.

    Numbers and curve are means over the folds, since scores of different networks do not compare;
    ``networks`` says of how many.
    """
    alike = _alike(verifications, {"left_out_fold"})
    return [same[0] if len(same) == 1 else _mean_of_folds(same) for same in alike]


def _alike(
    verifications: Sequence[Outcome], differing: set[str], shared: Sequence[str] = ()
) -> list[list[Outcome]]:
    """Verifications whose recipes differ in some fields alone, with what else they must share."""
    alike = defaultdict(list)
    for outcome in verifications:
        config = {n: v for n, v in outcome["config"].items() if n not in differing}
        # Results up to 2026-11-30 do not name the files of pairs.
        tested = outcome["protocol"], outcome.get("verified"), *(outcome[n] for n in shared)
        alike[_key(*tested, config, went_on(outcome))].append(outcome)
    return list(alike.values())


def _mean_of_folds(same: Sequence[Outcome]) -> Outcome:
    same = sorted(same, key=lambda outcome: outcome["tested_folds"])
    accuracy = [value for outcome in same for value in outcome["metrics"]["fold_accuracy"]]
    names = ("auc", "equal_error_rate", "tar_at_far")
    metrics, curve = _means([({n: o["metrics"][n] for n in names}, o["curve"]) for o in same])
    metrics |= {"fold_accuracy": accuracy, "accuracy": statistics.mean(accuracy)}
    metrics["standard_error"] = _standard_error(accuracy)
    return same[0] | {
        "networks": len(same),
        "tested_folds": sorted(fold for outcome in same for fold in outcome["tested_folds"]),
        "pairs": sum(outcome["pairs"] for outcome in same),
        "people_trained_on": min(outcome["people_trained_on"] for outcome in same),
        "metrics": metrics,
        "curve": curve,
        "all_pairs": _mean_of_all_pairs([outcome.get("all_pairs") for outcome in same]),
    }


def over_seeds(verifications: Sequence[Outcome]) -> list[Outcome]:
    """Merges what differs in the seed alone: means over seeds, also fold by fold.

    ``seeds`` says which, ``of_seeds`` has each. A seed that has other folds stays alone.
    """
    ordered = sorted(verifications, key=lambda outcome: outcome["config"].get("seed", 0))
    return [
        (same[0] if len(same) == 1 else _mean_of_seeds(same))
        | {"seeds": [outcome["config"].get("seed", 0) for outcome in same], "of_seeds": same}
        for same in _alike(ordered, {"seed", "left_out_fold"}, ["tested_folds"])
    ]


def _mean_of_seeds(same: Sequence[Outcome]) -> Outcome:
    everybody = [outcome.get("all_pairs") for outcome in same]
    metrics, curve = _means([(outcome["metrics"], outcome["curve"]) for outcome in same])
    metrics["standard_error"] = _standard_error(metrics["fold_accuracy"])
    all_pairs = None if None in everybody else _means(everybody)
    return same[0] | {"metrics": metrics, "curve": curve, "all_pairs": all_pairs}


def _standard_error(of_folds: Sequence[float]) -> float | None:
    """Of the mean over folds; None for one fold."""
    return statistics.stdev(of_folds) / math.sqrt(len(of_folds)) if of_folds[1:] else None


def _mean_of_all_pairs(of_folds: Sequence[Any]) -> dict[str, Any] | None:
    """Means over folds, counts as sums; None where a fold has no such pairs."""
    if None in of_folds:
        return None
    counts = {name: sum(of[name] for of in of_folds) for name in ("genuine", "impostors")}
    eer = [of["metrics"]["equal_error_rate"] for of in of_folds]
    far = max(of_folds[0]["metrics"]["tar_at_far"], key=float)
    tar = [of["metrics"]["tar_at_far"][far] for of in of_folds]
    return dict(_means(of_folds)) | counts | {"fold_eer": eer, "fold_tar": tar}


def _means(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *values: statistics.mean(values), *trees)


def went_on(verification: Outcome) -> bool:
    """Whether the network that was verified began as another one."""
    training = verification.get("training") or {}
    # Results up to 2026-11-29 say so in the command alone.
    return bool(training.get("init_from")) or "--init-from" in training.get("command", "")


def face_loss(verification: Outcome) -> str:
    """The name in `LOSSES` of a face network's loss; softmax for what has no loss, as pixels."""
    config = verification["config"]
    family, margin = config.get("family", "l-softmax"), config.get("margin", 1)
    return loss_name(family, margin, scale=config.get("scale"))


def _key(*parts: Any) -> str:
    """A text that is the same for the same parts, whatever the order of their names."""
    return json.dumps(parts, sort_keys=True)


def _check(file: Path, kind: str, outcome: Outcome) -> None:
    needed = NEEDED[kind]
    if kind == "run" and outcome.get("status") == "finished":
        needed += ("train", "test", "curves")
    if missing := [name for name in needed if name not in outcome]:
        raise ValueError(f"{file} must hold a result; it has no {', '.join(missing)}")
    if kind != "run":
        return
    if outcome["name"] not in CONFIGS:
        raise ValueError(f"{file} is of no configuration that list prints: {outcome['name']!r}")
    try:
        config = Config.from_json(outcome["config"])
        saved, changes = config.to_json(), changes_of(config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} must hold the configuration of its run: {error}") from error
    # A group is named by its changes: those of an older configuration say something else today.
    if wrong := differing(outcome["changes"], {field: saved[field] for field in changes}):
        raise ValueError(
            f"{file} is of another {outcome['name']} than today's, its changes were to be "
            f"{', '.join(wrong)}: move the file away, or train the run again"
        )


def _check_different(
    files: dict[str, Path], outcomes: Sequence[Outcome], names: Sequence[str]
) -> None:
    seen: dict[str, str] = {}
    for outcome in outcomes:
        first = seen.setdefault(_key(*(outcome.get(name) for name in names)), outcome["file"])
        if first != outcome["file"]:
            raise ValueError(
                f"{files[first]} and {files[outcome['file']]} hold the same run, equal in "
                f"{', '.join(names)}; remove one"
            )


def grouped(runs: Sequence[Outcome]) -> list[Group]:
    """Finished runs by configuration and changes, in the order of the cells; short runs first.

    Raises:
      ValueError: if seeds saw different data.
    """
    alike = defaultdict(list)
    for outcome in sorted(runs, key=lambda outcome: outcome["seed"]):
        if outcome["status"] == "finished":
            alike[_key(outcome["name"], outcome["changes"])].append(outcome)
    for same in alike.values():
        check_same_data(same)
    order = list(CONFIGS)
    return sorted(
        (Group(same[0]["name"], same[0]["changes"], same) for same in alike.values()),
        key=lambda g: (order.index(g.name), g.of("steps"), g.of("width"), len(g.changes), g.text),
    )


def full_runs(groups: Sequence[Group]) -> dict[str, Group]:
    """The runs of every configuration as it is; a group without runs where there is none."""
    none = {name: Group(name, {}, []) for name in CONFIGS}
    return none | {group.name: group for group in groups if not group.changes}


def check_same_data(runs: Sequence[Outcome]) -> None:
    """Seeds are averaged only if they saw the same data."""
    if len({outcome["data"]["fingerprint"] for outcome in runs}) > 1:
        files = ", ".join(outcome["file"] for outcome in runs)
        raise ValueError(f"these runs saw different data, whose mean says nothing: {files}")


def words(changes: dict[str, Any]) -> str:
    """Changes in words, updates and width first."""
    first = {n: changes[n] for n in ("steps", "width", "batch") if n in changes}
    return ", ".join(filter(None, (_word(n, v) for n, v in (first | changes).items())))


def _word(name: str, value: Any) -> str:
    if name in ("pace", "lam"):  # `Group.lam_words` describes these
        return ""
    if name == "steps":
        return f"{value:,} updates"
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, float):
        value = f"{value:g}"
    return f"{name.replace('_', ' ')} {value}"


def seeds_words(seeds: Iterable[int]) -> str:
    """seed 0; seeds 0, 1, 2."""
    ordered = sorted(set(seeds))
    return f"seed{'s' if ordered[1:] else ''} {', '.join(map(str, ordered))}"


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; without the latter for one value, empty for none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def counted(values: Sequence[float]) -> str:
    """Mean ± standard deviation (number of seeds); empty for none."""
    return f"{spread(values)} ({len(values)})" if values else ""
