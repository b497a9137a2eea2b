"""The report's tables as Markdown: first data set by loss, then the details."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.paper.cell import Cell
from experiments.paper.cells import CELLS, CONFIGS, changes_of, flags_of
from experiments.paper.config import Config
from experiments.report import protocol
from experiments.report.outcomes import Group, Outcome, Outcomes, full_runs, grouped, spread, words
from experiments.report.roc import face_words, for_choosing, lowest_rate
from lsoftmax_jax.schedule import LambdaPreset

FULL = "Data set by loss: full runs"
REDUCED = "Data set by loss: reduced runs, not comparable with the paper"
PAIRED = "Against softmax with the same seed"
TUNED = "λ by the error on the validation split"
RATES = "Learning rate of softmax, scale of other margins by the error on the validation split"
ALL = "Every run"

DATA = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar10plus": "CIFAR10+", "cifar100": "CIFAR100"}
LOSSES = {"hinge": "hinge", "softmax": "softmax", "m2": "m = 2", "m3": "m = 3", "m4": "m = 4"}
BEYOND = {"asoftmax": "A-Softmax, 4", "cosface": "CosFace, 0.35", "arcface": "ArcFace, 0.5"}

# What the paper reports on LFW by loss and margin, accuracy in %; the standing is that of a cell.
LFW = (
    ("softmax", 1, 96.53, "recalled"),
    ("m2", 2, 97.81, "recalled"),
    ("m3", 3, 98.27, "recalled"),
    ("m4", 4, 98.71, "confirmed"),
)
# The command that fills a blank of it, for a margin.
TRAIN_FACES = "train-faces --faces FACES --margin {} --out RUN"
# Of CASIA-WebFace, on which the paper's networks were trained, there are 10,575.
PEOPLE_OF_A_FULL_RUN = 10_000

HOW_TO_READ = """\
An entry is the paper's test error / ours, in %: mean ± standard deviation of the last iterate over
(so many) seeds; LFW's are accuracies. _r_ marks a number of the paper that is recalled: its text
was not at hand, and no public source confirms the number. The others are confirmed in one: the
authors' code, their README, issue threads, reviews. Where nothing ran stands the command that fills
the blank, after `python -m experiments`"""
ON_LFW = """\
The paper has 97.31 _r_ for softmax with contrastive loss on LFW. It trained on CASIA-WebFace, which
is no longer distributed: `FACES` is your copy, and `verify` scores the run."""


def tables(outcomes: Outcomes) -> str:
    """All of them; the matrices open, the details folded."""
    found = sections(outcomes)
    return "\n\n".join(
        f"### {title}\n\n{table}"
        if title in (FULL, REDUCED)
        else f"<details>\n<summary>{title}</summary>\n\n{table}\n\n</details>"
        for title, table in found.items()
    )


def sections(outcomes: Outcomes) -> dict[str, str]:
    """The tables by title."""
    groups, faces = grouped(outcomes.runs), outcomes.verifications
    full, reduced = full_runs(groups), [group for group in groups if group.changes]
    released = [cell for name, cell in CELLS.items() if name.startswith("released-")]
    drawn = [cell for cell in CELLS.values() if cell.where.startswith("Fig.")]
    beyond = [cell for cell in CELLS.values() if cell.where.startswith("beyond")]
    return {
        FULL: f"{full_matrix(full, faces)}\n\n{HOW_TO_READ}.\n\n{ON_LFW}",
        REDUCED: reduced_matrix(reduced, faces),
        PAIRED: _against_softmax(groups),
        ALL: _every_run(groups),
        "Reduced runs that are left, in their order": _commands(protocol.left(reduced)),
        "Recipe of the released prototxts": _cells(released, full),
        "Runs of Fig. 2 and Fig. 7": _cells(drawn, full),
        "Other margins, full runs": _cells(beyond, full),
        RATES: _rates(outcomes.validated),
        TUNED: _tunings(outcomes.tunings),
        "Diverged runs": _diverged(outcomes.runs),
        "LFW": _verifications(faces),
    }


def full_matrix(full: Mapping[str, Group], faces: Sequence[Outcome]) -> str:
    """The paper's number and that of the full runs, by name, a row a data set."""
    rows = []
    for data, title in DATA.items():
        names = [f"{data}-{loss}" for loss in LOSSES]
        rows.append([title, *(f"{paper_number(name)} / {_ours(full[name])}" for name in names)])
    trained = [o for o in faces if o["people_trained_on"] >= PEOPLE_OF_A_FULL_RUN]
    rows.append(["LFW, accuracy", *_face_entries(trained, f"`{TRAIN_FACES}`")])
    return _table(("", *LOSSES.values()), rows, 0)


def reduced_matrix(groups: Sequence[Group], faces: Sequence[Outcome]) -> str:
    """The same for reduced runs, a row a data set and reduction; blank where none is planned."""
    rows = []
    for data, title in DATA.items():
        names = [f"{data}-{loss}" for loss in LOSSES | BEYOND]
        ran = [group for group in groups if group.name in names]
        plans = [wanted for wanted in protocol.WANTED if wanted.name in names]
        reductions = [g.reduction for g in ran] + [wanted.reduction for wanted in plans]
        reductions.sort(key=lambda r: (r.get("steps", 0), r.get("width", 1)))
        for shown, reduction in {_flags(names[0], r): r for r in reductions}.items():
            here = [group for group in ran if group.reduction == reduction]
            planned = [wanted for wanted in plans if wanted.reduction == reduction]
            entries = [_reduced_entry(name, here, planned) for name in names]
            rows.append([title, f"`{shown}`", *entries])
    small = [o for o in faces if 0 < o["people_trained_on"] < PEOPLE_OF_A_FULL_RUN]
    rows.append(
        ["LFW, accuracy", "a few hundred people of LFW", *_face_entries(small), *[""] * len(BEYOND)]
    )
    return _table(("", "reduced by", *LOSSES.values(), *BEYOND.values()), rows, 0)


def _ours(full: Group) -> str:
    """The error of full runs, or the command that fills the blank."""
    return full.error or f"`train {full.name}`"


def paper_number(name: str) -> str:
    """The number of a configuration's cell, marked if it is recalled."""
    cell = CELLS[name]
    return "" if cell.reported is None else _marked(cell.reported, cell.standing)


def _marked(number: float, standing: str | None) -> str:
    return f"{number:.2f}{' _r_' if standing == 'recalled' else ''}"


def _flags(name: str, reduction: dict[str, Any]) -> str:
    """The flags that reduce a run of a configuration so."""
    return " ".join(flags_of(Config.from_json(CONFIGS[name].to_json() | reduction)))


def _reduced_entry(name: str, groups: Sequence[Group], plans: Sequence[protocol.Wanted]) -> str:
    """The paper's number / a line for each λ or learning rate that ran, or is to run."""
    lines = [": ".join(filter(None, [g.error, g.own_words])) for g in groups if g.name == name]
    for plan in plans:
        if plan.name == name and not plan.done(groups):
            pace = "".join(f" --{flag} {value}" for flag, value in plan.own.items())
            lines.append(f"`train {name}{pace}`")
    paper = paper_number(name) if lines else ""
    return " / ".join(filter(None, [paper, "<br>".join(lines)]))


def _face_entries(faces: Sequence[Outcome], blank: str = "") -> list[str]:
    """LFW's row: accuracies of verifications by margin, or what fills the blank of a margin."""
    entries = [""]  # no hinge
    for _, margin, number, standing in LFW:
        lines = [
            ": ".join(filter(None, [_accuracy(outcome), face_words(outcome)]))
            for outcome in faces
            if outcome["config"].get("margin") == margin and not for_choosing(outcome)
        ]
        ours = "<br>".join(lines) or blank.format(margin)
        entries.append(f"{_marked(number, standing)} / {ours}" if ours else "")
    return entries


def _accuracy(outcome: Outcome) -> str:
    """Mean ± standard error over the folds (number of folds)."""
    error = outcome["metrics"]["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    folds = len(outcome["tested_folds"])
    count = "1 fold" if folds == 1 else f"{folds} folds"
    return f"{100 * outcome['metrics']['accuracy']:.2f}{spread} ({count})"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> str:
    """A Markdown table, its last so many columns aligned right; "None yet." without rows."""
    if not rows:
        return "None yet."
    rules = ["---"] * (len(headers) - numbers) + ["--:"] * numbers
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, rules, *rows))


def _commands(commands: Sequence[str]) -> str:
    """A block to copy."""
    return "\n".join(["```sh", *commands, "```"]) if commands else "None."


def _cells(cells: Sequence[Cell], full: Mapping[str, Group]) -> str:
    rows = []
    for cell in cells:
        group = full[cell.config.name]
        numbers = [paper_number(group.name), _ours(group), spread(group.errors("train"))]
        rows.append([f"`{group.name}`", cell.where, group.devices, *numbers])
    headers = ("configuration", "cell", "device", "paper, %", "ours, test error %", "train error %")
    return _table(headers, rows, 3)


def _every_run(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        numbers = [spread(group.errors(split)) for split in ("test", "train")]
        for name in ("target_angle", "intra_class_angle", "inter_class_angle"):
            angle = statistics.mean(outcome["test"][name] for outcome in group.runs)
            numbers.append(f"{angle:.1f}")
        row = [f"`{group.name}`", group.text, group.devices]
        rows.append([*row, *numbers, str(len(group.runs))])
    headers = ("configuration", "changed", "device", "test error %", "train error %")
    of_angles = ("to the column", "intra-class", "inter-class", "seeds")
    return f"{_table((*headers, *of_angles), rows, 6)}\n\nAngles of the test features, degrees."


def _against_softmax(groups: Sequence[Group]) -> str:
    """Paired: the runs of a seed begin with the same weights and see the same batches."""
    rows = []
    for group in groups:
        softmax = _softmax_beside(group, groups)
        if softmax and (differences := group.above(softmax)):
            lower = f"{sum(d < 0 for d in differences)} of {len(differences)}"
            row = [f"`{group.name}`", group.text, softmax.own_words, spread(differences), lower]
            rows.append(row)
    headers = ("configuration", "changed", "softmax's own", "test error less softmax's, points")
    return _table((*headers, "lower"), rows, 2)


def _softmax_beside(group: Group, groups: Sequence[Group]) -> Group | None:
    """Runs that differ in the loss alone and have no margin: those of the same learning rate if
    there are any, else those of the one that was tuned."""
    plain = replace(CONFIGS[group.name].without_margin(), hinge=False)
    alike = [g for g in groups if g.name != group.name and g.reduction == group.reduction]
    beside = [g for g in alike if replace(plain, name=g.name) == CONFIGS[g.name]]
    rate = group.own.get("learning_rate")
    same = [g for g in beside if g.own.get("learning_rate") == rate]
    return same[0] if same else beside[0] if len(beside) == 1 else None


def _rates(validated: Sequence[Outcome]) -> str:
    rows = []
    for group in grouped(validated):
        scale = group.of("scale")
        if scale is not None or not CONFIGS[group.name].has_margin:
            row = [f"`{group.name}`", group.reduced_by("validation")]
            constants = [f"{group.of('learning_rate'):g}", "" if scale is None else f"{scale:g}"]
            rows.append([*row, *constants, spread(group.errors("test")), str(len(group.runs))])
    headers = ("configuration", "changed", "learning rate", "scale", "validation error %", "seeds")
    return _table(headers, rows, 4)


def _tunings(tunings: Sequence[Outcome]) -> str:
    rows = []
    for outcome in tunings:
        config = Config.from_json(outcome["config"])
        changes = words(changes_of(config))
        for candidate in outcome["candidates"]:
            lam, best = candidate["lam"], candidate["lam"] == outcome["best"]
            constants = [f"{lam[name]:g}" for name in LambdaPreset._fields]
            found = candidate["validation_errors"]
            shown = f"**{spread(found)}**" if best else spread(found)
            rows.append([f"`{config.name}`", changes, *constants, shown, str(len(found))])
    headers = ("configuration", "changed", *LambdaPreset._fields, "validation error %", "seeds")
    return _table(headers, rows, 6)


def _diverged(runs: Sequence[Outcome]) -> str:
    rows = []
    for outcome in runs:
        if seen := outcome["diverged"]:
            lam = "not finite" if seen["lam"] is None else f"{seen['lam']:.4g}"
            changed = Group(outcome["name"], outcome["changes"], [outcome]).text
            numbers = [str(outcome["seed"]), str(seen["step"]), lam]
            rows.append([f"`{outcome['name']}`", changed, *numbers])
    return _table(("configuration", "changed", "seed", "step", "λ"), rows, 3)


def _verifications(faces: Sequence[Outcome]) -> str:
    rows = []
    for outcome in faces:
        seen = outcome["metrics"]
        # A rate below one false accept in the different pairs, half of all, was not measured.
        at_far = ", ".join(
            f"{far}: {100 * tar:.2f}"
            for far, tar in seen["tar_at_far"].items()
            if float(far) >= lowest_rate(outcome)
        )
        row = [
            f"`{outcome['file'].removesuffix('.json')}`",
            outcome["protocol"],
            str(outcome["people_trained_on"]),
            f"{outcome['pairs']:,}",
            _accuracy(outcome),
            f"{100 * seen['equal_error_rate']:.2f}",
            f"{seen['auc']:.4f}",
            at_far,
        ]
        rows.append(row)
    headers = ("ours", "protocol", "people trained on", "pairs")
    metrics = ("accuracy % ± standard error over folds", "EER %", "AUC", "TAR % at FAR")
    return _table((*headers, *metrics), rows, 6)
