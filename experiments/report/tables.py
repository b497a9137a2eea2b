"""The report's tables as Markdown: first data set by loss, then the details."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.tables import markdown
from experiments.paper import campaign
from experiments.paper.cells import CELLS, CONFIGS, changes_of, command_of, flags_of, run_name
from experiments.paper.config import Config
from experiments.paper.style import LOSSES
from experiments.report.differences import difference, mcnemar, paired, softmax_beside
from experiments.report.outcomes import (
    Group,
    Outcome,
    Outcomes,
    counted,
    face_loss,
    full_runs,
    grouped,
    spread,
    went_on,
)
from experiments.report.roc import face_words, for_choosing, lowest_rate

FULL = "Data set by loss: full runs"
CHANGED = "Data set by loss: changed runs, not comparable with the paper"
AGAINST = "Against softmax"
ALL = "Every run"
LEFT = "Runs that are left, batch by batch"
VALIDATED = "Tried on the validation split"
DIVERGED = "Diverged runs"
VERIFIED = "LFW"

DATA = {
    "mnist": "MNIST",
    "cifar10": "CIFAR10",
    "cifar10plus": "CIFAR10+",
    "cifar100": "CIFAR100",
    "released-mnist": "MNIST, released recipe",
    "released-cifar10": "CIFAR10, released recipe",
    "released-cifar10plus": "CIFAR10+, released recipe",
    "fig2": "MNIST, Fig. 2",
}
FACES = "LFW, accuracy"
# With this many evaluations the table also says how the test error moved during the run.
EVALUATIONS = 30

# What the paper reports on LFW by loss and margin, accuracy in %; the standing is that of a cell.
LFW = (
    ("softmax", 1, 96.53, "recalled"),
    ("m2", 2, 97.81, "recalled"),
    ("m3", 3, 98.27, "recalled"),
    ("m4", 4, 98.71, "confirmed"),
)
# The command that fills a blank of LFW's row, for a margin.
TRAIN_FACES = "train-faces --faces FACES --margin {} --out RUN"
# The paper's networks were trained on the 10,575 people of CASIA-WebFace.
PEOPLE_OF_A_FULL_RUN = 10_000


def tables(outcomes: Outcomes, *titles: str) -> str:
    """All of them, or those of some titles."""
    found = sections(outcomes)
    return "\n\n".join(f"### {title}\n\n{found[title]}" for title in titles or found)


def sections(outcomes: Outcomes) -> dict[str, str]:
    """The tables by title."""
    groups, faces = grouped(outcomes.runs), outcomes.verifications
    return {
        FULL: full_matrix(groups, faces),
        CHANGED: changed_matrix([group for group in groups if group.changes], faces),
        AGAINST: _against_softmax(groups),
        ALL: _every_run(groups),
        LEFT: _left([*outcomes.runs, *outcomes.validated]),
        VALIDATED: _validated(outcomes.validated, outcomes.tunings),
        DIVERGED: _diverged(outcomes.runs),
        VERIFIED: _verifications(faces),
    }


def full_matrix(groups: Sequence[Group], faces: Sequence[Outcome]) -> str:
    """The paper's number and that of full runs: a row for each data set, a column for each loss."""
    full, entries = full_runs(groups), []
    for name, cell in CELLS.items():
        group = full[name]
        if group.data in DATA:
            ours = group.entry if group.runs else f"`train {name}`"
            paper = marked(cell.reported, cell.standing)
            entries.append((DATA[group.data], group.loss, f"{paper} / {ours}" if paper else ours))
    trained = _face_entries(faces, PEOPLE_OF_A_FULL_RUN)
    for loss, margin, number, standing in LFW:
        found = "<br>".join(ours for _, _, name, ours in trained if name == loss)
        ours = found or f"`{TRAIN_FACES.format(margin)}`"
        entries.append((FACES, loss, f"{marked(number, standing)} / {ours}"))
    return _matrix(entries, ["data"])


def changed_matrix(groups: Sequence[Group], faces: Sequence[Outcome]) -> str:
    """The matrix of changed runs: a row for each data set and change, a line for each λ or rate."""
    entries = [
        (DATA[group.data], _flags(group), group.loss, group.entry)
        for group in sorted(groups, key=lambda group: (group.of("steps"), group.of("width")))
        if group.data in DATA
    ]
    entries.sort(key=lambda entry: list(DATA.values()).index(entry[0]))
    return _matrix([*entries, *_face_entries(faces, 1, PEOPLE_OF_A_FULL_RUN)], ["data", "changed"])


def _matrix(entries: Sequence[Sequence[str]], rows: list[str]) -> str:
    """Entries (row, loss, text) as a table; those of one place are lines of it."""
    import pandas as pd  # takes a second, for which no other command should wait

    frame = pd.DataFrame(entries, columns=[*rows, "loss", "entry"])
    found = frame.pivot_table("entry", rows, "loss", aggfunc="<br>".join, sort=False)
    losses = [loss for loss in LOSSES if loss in found]
    shown = found.reindex(columns=losses).fillna("").reset_index()
    return _table([*rows, *(LOSSES[loss].title for loss in losses)], shown.to_numpy().tolist(), 0)


def marked(number: float | None, standing: str | None, recalled: str = " _r_") -> str:
    """The paper's number, with a mark if it is recalled; empty if there is none."""
    return "" if number is None else f"{number:.2f}{recalled if standing == 'recalled' else ''}"


def _flags(group: Group) -> str:
    """The flags that change runs of all losses so."""
    changed = Config.from_json(CONFIGS[group.name].to_json() | group.reduction)
    return f"`{' '.join(flags_of(changed))}`" if group.reduction else ""


def _face_entries(faces: Sequence[Outcome], least: int, below: float = math.inf) -> list[Any]:
    """Accuracies of verifications of networks that were trained on so many people."""
    entries = []
    for outcome in faces:
        if least <= outcome["people_trained_on"] < below and not for_choosing(outcome):
            decay = f"decay {outcome['config'].get('weight_decay', 0):g}"
            said = ", ".join(filter(None, [face_words(outcome), decay]))
            line = f"{_accuracy(outcome)}: {said}"
            entries.append((FACES, "a few hundred people of LFW", face_loss(outcome), line))
    return entries


def _accuracy(outcome: Outcome) -> str:
    """Mean ± standard error over the folds (number of folds, and of seeds if several)."""
    error = outcome["metrics"]["standard_error"]
    spread = "" if error is None else f" ± {100 * error:.2f}"
    folds = len(outcome["tested_folds"])
    count = "1 fold" if folds == 1 else f"{folds} folds"
    if outcome["seeds"][1:]:
        count += f", {len(outcome['seeds'])} seeds"
    return f"{100 * outcome['metrics']['accuracy']:.2f}{spread} ({count})"


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int) -> str:
    """A Markdown table, its last so many columns aligned right; "None yet." without rows."""
    if not (rows := list(rows)):
        return "None yet."
    return markdown(headers, rows, numbers)


def _against_softmax(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        if softmax := softmax_beside(group, groups):
            found = difference(group, softmax)
            over = found.over + ("" if group.devices == softmax.devices else ", other devices")
            row = [f"`{group.name}`", group.text, softmax.own_words, over, found]
            rows.append([*row, _image_by_image(group, softmax)])
    headers = ("configuration", "changed", "softmax's own", "interval over", "points")
    return _table((*headers, "wrong alone : softmax alone, p"), rows, 2)


def _image_by_image(group: Group, softmax: Group) -> str:
    """McNemar's test of each seed that both have, where the results hold predicted labels."""
    theirs = {run["seed"]: run for run in softmax.runs}
    pairs = [(run, theirs[run["seed"]]) for run in group.runs if run["seed"] in theirs]
    found = [seen for pair in pairs if (seen := mcnemar(*pair))]
    return ", ".join(f"{ours} : {others}, {p:.2g}" for ours, others, p in found)


def _every_run(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        curves = [run["curves"].get("test", {}).get("error", []) for run in group.runs]
        often = curves if all(len(curve) >= EVALUATIONS for curve in curves) else []
        logs = [run["curves"].get("train", {}) for run in group.runs if group.lam_words]
        shares = [100 * statistics.mean(s or 0 for s in _shares(log)) for log in logs if log]
        angles = ("target_angle", "intra_class_angle", "inter_class_angle")
        numbers = (
            _mean([min(curve) for curve in often], 2),
            _mean([statistics.stdev(curve[-6:]) for curve in often], 2),
            spread(group.errors("train")),
            _mean(shares, 1),
            *(_mean([run["test"][angle] for run in group.runs], 1) for angle in angles),
        )
        named = (f"`{group.name}`", group.text, group.devices, spread(group.errors("test")))
        rows.append([*named, *numbers, len(group.runs)])
    headers = ("configuration", "changed", "device", "test error %", "lowest", "last six")
    others = ("train error %", "share", "to the column", "intra-class", "inter-class", "seeds")
    return _table((*headers, *others), rows, 9)


def _shares(log: dict[str, Any]) -> list[float | None]:
    """The share of the margin at each point; an older log has λ, null where it was infinite."""
    return log.get("share") or [0 if lam is None else 1 / (1 + lam) for lam in log["lam"]]


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f}" if values else ""


def _left(runs: Sequence[Outcome]) -> str:
    """The commands of the campaign's runs that have no result yet."""
    done = {run["file"].removeprefix("tune/").removesuffix(".json") for run in runs}
    lines = []
    for batch, wanted in campaign.BATCHES.items():
        missing = [command_of(config) for config in wanted if run_name(config) not in done]
        lines += [f"# batch {batch}", *missing] if missing else []
    return "\n".join(["```sh", *lines, "```"]) if lines else "None."


def _validated(validated: Sequence[Outcome], tunings: Sequence[Outcome]) -> str:
    """Every try on the validation split: rates and scales, then λ, the best in bold."""
    tried = [candidate for outcome in tunings for candidate in outcome["candidates"]]
    named = {command for candidate in tried for command in candidate.get("commands", [])}
    rows = [
        [f"`{g.name}`", ", ".join(filter(None, [g.reduced_by("validation"), g.own_words])), g.error]
        for g in grouped([run for run in validated if run.get("command") not in named])
    ]
    for outcome in tunings:
        config = Config.from_json(outcome["config"])
        for candidate in outcome["candidates"]:
            group = Group(config.name, changes_of(config) | {"lam": candidate["lam"]}, [])
            mark = "**" if candidate["lam"] == outcome["best"] else ""
            error = f"{mark}{counted(candidate['validation_errors'])}{mark}"
            rows.append([f"`{config.name}`", group.text, error])
    return _table(("configuration", "changed", "validation error % (seeds)"), rows, 1)


def _diverged(runs: Sequence[Outcome]) -> str:
    rows = [
        [
            f"`{o['name']}`",
            Group(o["name"], o["changes"], []).text,
            o["seed"],
            o["diverged"]["step"],
        ]
        for o in runs
        if o["diverged"]
    ]
    return _table(("configuration", "changed", "seed", "step"), rows, 2)


def _verifications(faces: Sequence[Outcome]) -> str:
    rows = []
    for outcome in faces:
        seen = outcome["metrics"]
        # Half of the pairs are different. No rate below one false accept among them was measured.
        measured = [far for far in seen["tar_at_far"] if float(far) >= lowest_rate(outcome)]
        at_far = ", ".join(f"{far}: {100 * seen['tar_at_far'][far]:.2f}" for far in measured)
        named = (f"`{outcome['file'].removesuffix('.json')}`", outcome["protocol"])
        counts = (outcome["people_trained_on"], f"{outcome['pairs']:,}", _accuracy(outcome))
        numbers = (f"{100 * seen['equal_error_rate']:.2f}", f"{seen['auc']:.4f}", at_far)
        less, *less_of_all = _less_going_on(outcome, faces)
        rows.append([*named, *counts, less, *numbers, *_of_all_pairs(outcome), *less_of_all])
    headers = ["ours", "protocol", "people trained on", "pairs"]
    headers += ["accuracy % ± standard error over folds", "minus softmax"]
    headers += ["EER %", "AUC", "TAR % at FAR"]
    if any(outcome.get("all_pairs") for outcome in faces):
        headers += ["all pairs", "EER % of all", "TAR % of all at FAR"]
        headers += ["EER of all, minus softmax", "TAR of all at FAR 0.01, minus softmax"]
    return _table(headers, [row[: len(headers)] for row in rows], 8)


def _of_all_pairs(outcome: Outcome) -> tuple[str, str, str]:
    """Number, EER and TAR at FAR of all pairs of people whom the network was not trained on."""
    if (found := outcome.get("all_pairs")) is None:
        return "", "", ""
    count, seen = found["genuine"] + found["impostors"], found["metrics"]
    least = outcome.get("networks", 1) / found["impostors"]
    at_far = [f"{far}: {100 * tar:.2f}" for far, tar in seen["tar_at_far"].items()]
    measured = [text for text in at_far if float(text.partition(":")[0]) >= least]
    return f"{count:,}", f"{100 * seen['equal_error_rate']:.2f}", ", ".join(measured)


def _less_going_on(outcome: Outcome, faces: Sequence[Outcome]) -> tuple[str, str, str]:
    """Accuracy, EER and TAR of all pairs, less those of softmax going on; over the same folds."""
    same = [
        other
        for other in faces
        if all(other[name] == outcome[name] for name in ("protocol", "tested_folds", "seeds"))
        and went_on(other)
        and face_loss(other) == "softmax"
        and other is not outcome
    ]
    if len(same) != 1 or len(outcome["tested_folds"]) < 2:
        return "", "", ""
    accuracy, eer, tar = (_less(outcome, same[0], of) for of in ("accuracy", "eer", "tar"))
    return accuracy, eer, tar


def _less(ours: Outcome, theirs: Outcome, measure: str) -> str:
    """The difference over the folds, then that of each seed if there are several."""
    first, second = (100 * np.array(_of_folds(outcome)[measure]) for outcome in (ours, theirs))
    if not len(first) or not len(second):
        return ""
    text = str(paired(first, second, "folds"))
    if ours["seeds"][1:]:
        pairs = zip(ours["of_seeds"], theirs["of_seeds"], strict=True)
        means = [[np.mean(_of_folds(one)[measure]) for one in pair] for pair in pairs]
        text += f"; by seed {', '.join(f'{100 * (mean - other):.2f}' for mean, other in means)}"
    return text


def _of_folds(outcome: Outcome) -> dict[str, list[float]]:
    """A number a fold: accuracy of the listed pairs; EER, and TAR at a FAR of 1 %, of all pairs."""
    of_all = outcome.get("all_pairs") or {}
    accuracy = outcome["metrics"]["fold_accuracy"]
    return {"accuracy": accuracy} | {n: of_all.get(f"fold_{n}", []) for n in ("eer", "tar")}
