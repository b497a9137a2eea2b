"""Tables of results in experiments/README.md: every number comes from a result's file.

A cell's entry is the test error of the last iterate, mean ± sample standard deviation over seeds.
Reduced runs have a table of their own and never count for a cell; diverged ones are listed.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.paper.cell import Cell
from experiments.paper.cells import CELLS, CONFIGS, changes_of
from experiments.paper.config import Config
from experiments.run import train
from experiments.store import results as result
from experiments.store.files import replacing

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- report: written by python -m experiments report -->"
END = "<!-- report: end -->"

PAPER = "Tables 2 to 4, recipe `paper`"
REDUCED = "Reduced runs, not comparable with the paper"
PAIRED = "Against softmax with the same seed"
TUNED = "λ by the error on the validation split"

# What the paper reports on LFW; its training set, CASIA-WebFace, is no longer distributed.
LFW = (
    ("softmax", 96.53, "recalled"),
    ("softmax and contrastive loss", 97.31, "recalled"),
    ("L-Softmax, m = 2", 97.81, "recalled"),
    ("L-Softmax, m = 3", 98.27, "recalled"),
    ("L-Softmax, m = 4", 98.71, "confirmed"),
)

Outcome = dict[str, Any]


def report(out: Path = train.RESULTS, readme: Path = README, check: bool = False) -> int:
    """Writes the tables of results into a README, between its two markers.

    Args:
      out: folder of the results.
      readme: the file.
      check: write nothing; exit with 1 if the tables are not those of the results.
    """
    if not out.is_dir():
        raise ValueError(f"out must be a folder of results, got {out}")
    before = readme.read_text()
    after = updated(before, tables([*load_results(out), *load_results(out / "tune")]))
    if before == after:
        print(f"{readme} is up to date")
        return 0
    if check:
        print(f"{readme} differs from the results in {out}; python -m experiments report writes it")
        return 1
    with replacing(readme) as file:
        file.write(after.encode())
    print(f"{readme} written")
    return 0


def load_results(out: Path) -> list[Outcome]:
    """Every result in a folder, in the order of file names."""
    return result.load_all(out)


def updated(text: str, tables: str) -> str:
    """The text with other tables between its markers.

    Raises:
      ValueError: if it has no such markers.
    """
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        raise ValueError(f"the README must hold the lines {BEGIN} and {END}")
    return f"{text[:start]}{BEGIN}\n\n{tables}\n\n{text[end:]}"


def tables(outcomes: Sequence[Outcome]) -> str:
    """All tables as Markdown.

    Args:
      outcomes: results of runs, of tunings and of verifications.
    """
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in sections(outcomes).items())


def sections(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The tables as Markdown, by title."""
    faces = [o for o in outcomes if o.get("kind") == "verification"]
    tunings = [o for o in outcomes if o.get("kind") == "tuning"]
    # A tuning's candidates are no results: they were tested on training images held out.
    runs = [o for o in outcomes if "kind" not in o and "validation" not in o["changes"]]
    full = [o for o in runs if not o["reduced"]]
    paper, released, figures = [], [], []
    for name, cell in CELLS.items():
        if cell.where.startswith("Fig."):
            figures.append(cell)
        elif name.startswith("released-"):
            released.append(cell)
        elif cell.where.startswith("Table"):
            paper.append(cell)
    return {
        PAPER: _cells(paper, full),
        "Tables 2 to 4, recipe of the released prototxts": _cells(released, full),
        "Runs of Fig. 2 and Fig. 7": _cells(figures, full),
        REDUCED: _reduced(runs),
        PAIRED: _against_softmax(runs),
        TUNED: _tunings(tunings),
        "Diverged runs": _diverged(runs),
        "LFW": f"{_lfw_paper()}\n\n{_verifications(faces)}",
    }


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A Markdown table, its last so many columns aligned right; "None yet." without rows."""
    if not rows:
        return "None yet."
    rules = ["---"] * (len(headers) - numbers) + ["--:"] * numbers
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, rules, *rows))


def _cells(cells: Sequence[Cell], full: Sequence[Outcome]) -> str:
    headers = ("configuration", "cell", "standing", "device")
    numbers = ("paper, test error %", "ours, test error %", "ours, train error %", "seeds")
    rows = []
    for cell in cells:
        name = cell.config.name
        runs = [o for o in full if o["name"] == name and o["status"] == "finished"]
        _check_same_data(runs)
        paper = "" if cell.reported is None else f"{cell.reported:.2f}"
        measured = [_errors(runs, "test"), _errors(runs, "train"), _count(runs)]
        standing = cell.standing or ""
        rows.append([f"`{name}`", cell.where, standing, _devices(runs), paper, *measured])
    return _table((*headers, *numbers), rows, len(numbers))


def _reduced(runs: Sequence[Outcome]) -> str:
    groups = defaultdict(list)
    for outcome in runs:
        if outcome["reduced"] and outcome["status"] == "finished":
            groups[outcome["name"], _changes(outcome)].append(outcome)
    rows = []
    for (name, changes), group in groups.items():
        _check_same_data(group)
        measured = [_errors(group, "test"), _errors(group, "train"), *_angles(group)]
        rows.append([f"`{name}`", changes, _devices(group), *measured, _count(group)])
    headers = ("configuration", "changed", "device", "test error %", "train error %")
    angles = ("to the column", "intra-class", "inter-class")
    return (
        f"{_table((*headers, *angles, 'seeds'), rows, 6)}\n\nAngles of the test features, degrees."
    )


def _against_softmax(runs: Sequence[Outcome]) -> str:
    """Paired: the runs of a seed begin with the same weights and see the same batches."""
    finished = [outcome for outcome in runs if outcome["status"] == "finished"]
    softmaxes = {(o["name"], _changes(o), o["seed"]): o for o in finished}
    differences = defaultdict(list)
    for outcome in finished:
        changes = {name: value for name, value in outcome["changes"].items() if name != "lam"}
        alike = _softmax_of(outcome["name"]), _changes({"changes": changes}), outcome["seed"]
        softmax = softmaxes.get(alike)
        if softmax is not None and softmax is not outcome:
            _check_same_data([softmax, outcome])
            more = outcome["test"]["error"] - softmax["test"]["error"]
            differences[outcome["name"], _changes(outcome)].append(more)
    rows = [
        [f"`{name}`", changes, _spread(found), f"{sum(d < 0 for d in found)} of {len(found)}"]
        for (name, changes), found in differences.items()
    ]
    headers = ("configuration", "changed", "test error less softmax's, points", "lower")
    return _table(headers, rows, 2)


def _softmax_of(name: str) -> str | None:
    """The configuration that differs from this one in the loss alone, and has no margin."""
    listed = ("name", "hinge", "margin")
    for other in CONFIGS.values():
        if other.margin == 1 and not other.hinge:
            taken = {field: getattr(other, field) for field in listed}
            if replace(CONFIGS[name], **taken) == other:
                return other.name
    return None


def _tunings(tunings: Sequence[Outcome]) -> str:
    rows = []
    for outcome in tunings:
        config = Config.from_json(outcome["config"])
        changes = _changes({"changes": changes_of(config)})
        for candidate in outcome["candidates"]:
            lam, best = candidate["lam"], candidate["lam"] == outcome["best"]
            constants = [f"{lam[name]:g}" for name in ("base", "gamma", "power", "minimum")]
            errors = candidate["validation_errors"]
            shown = f"**{_spread(errors)}**" if best else _spread(errors)
            rows.append([f"`{config.name}`", changes, *constants, shown, str(len(errors))])
    headers = ("configuration", "changed", "base", "gamma", "power", "minimum")
    return _table((*headers, "validation error %", "seeds"), rows, 6)


def _diverged(runs: Sequence[Outcome]) -> str:
    rows = []
    for outcome in runs:
        if seen := outcome["diverged"]:
            numbers = (str(outcome["seed"]), str(seen["step"]), _short(seen["lam"]))
            rows.append([f"`{outcome['name']}`", _changes(outcome), *numbers])
    return _table(("configuration", "changed", "seed", "step", "λ"), rows, 3)


def _lfw_paper() -> str:
    rows = [[loss, standing, f"{accuracy:.2f}"] for loss, accuracy, standing in LFW]
    table = _table(("the paper's", "standing", "accuracy %"), rows, 1)
    return f"{table}\n\nTrained on CASIA-WebFace, unrestricted protocol with labelled outside data."


def _verifications(faces: Sequence[Outcome]) -> str:
    rows = []
    for outcome in faces:
        seen, folds = outcome["metrics"], len(outcome["tested_folds"])
        error = seen["standard_error"]
        spread = "" if error is None else f" ± {100 * error:.2f}"
        at_far = ", ".join(f"{far}: {100 * tar:.2f}" for far, tar in seen["tar_at_far"].items())
        numbers = (
            str(outcome["people_trained_on"]),
            f"{outcome['pairs']} in {folds}",
            f"{100 * seen['accuracy']:.2f}{spread}",
            f"{100 * seen['equal_error_rate']:.2f}",
            f"{seen['auc']:.4f}",
            at_far,
        )
        rows.append([f"`{outcome['file'][:-5]}`", outcome["protocol"], *numbers])
    headers = ("ours", "protocol", "people trained on", "pairs in folds")
    metrics = ("accuracy % ± standard error over folds", "EER %", "AUC", "TAR % at FAR")
    return _table((*headers, *metrics), rows, 6)


def _check_same_data(runs: Sequence[Outcome]) -> None:
    """Seeds are averaged only if they saw the same data."""
    if len({outcome["data"]["fingerprint"] for outcome in runs}) > 1:
        files = ", ".join(outcome["file"] for outcome in runs)
        raise ValueError(f"these runs saw different data, whose mean says nothing: {files}")


def _errors(runs: Sequence[Outcome], split: str) -> str:
    return _spread([outcome[split]["error"] for outcome in runs])


def _spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; without the latter for one value, empty for none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _angles(runs: Sequence[Outcome]) -> list[str]:
    names = ("target_angle", "intra_class_angle", "inter_class_angle")
    return [f"{statistics.mean(outcome['test'][name] for outcome in runs):.1f}" for name in names]


def _changes(outcome: Outcome) -> str:
    """Where a run departs from its configuration: steps 200, lam.base 10."""
    flat: dict[str, Any] = {}
    for name, value in outcome["changes"].items():
        nested = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{part}".rstrip("."): entry for part, entry in nested.items()}
    return ", ".join(f"{name} {value}" for name, value in flat.items())


def _count(runs: Sequence[Outcome]) -> str:
    return str(len(runs)) if runs else ""


def _devices(runs: Sequence[Outcome]) -> str:
    return ", ".join(sorted({outcome["device"] for outcome in runs}))


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
