"""The report shows the numbers of the results, and nothing that was not run."""

import re
import subprocess
from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.paper import campaign
from experiments.paper.cells import CELLS, CONFIGS, changes_of, command_of, run_name
from experiments.report import front, report, tables
from experiments.report.outcomes import RESULTS, grouped, load_outcomes
from experiments.report.report import BEGIN, END
from experiments.store import results as result
from made_up import run_of

FACES = {
    "kind": "verification",
    "protocol": "unrestricted, no outside data",
    "pairs": 600,
    "tested_folds": [3],
    "people_trained_on": 5000,
    "config": {"margin": 4, "lam": [1000.0, 0.1, 1.0, 30.0], "weight_decay": 5e-4},
    "curve": {},
    "metrics": {
        "accuracy": 0.9,
        "standard_error": None,
        "auc": 0.95,
        "equal_error_rate": 0.11,
        "tar_at_far": {"0.001": 0.1, "0.1": 0.8},
    },
}


RUNS = [
    run_of("mnist-m4", 0, 0.30),
    run_of("mnist-m4", 1, 0.40),
    run_of("mnist-m4", 2, None),
    run_of("mnist-m2", 0, 0.375),
    run_of("mnist-m4", 0, 9.0, steps=8, lam={"base": 1.0, "gamma": 0.5}),
    run_of("mnist-m4", 0, 8.0, steps=8),
]


def sections(folder, runs):
    for number, outcome in enumerate(runs):
        result.save(folder / f"r{number}.json", outcome)
    return tables.sections(load_outcomes(folder))


def row(table, first):
    """The entries, by header, of the row that begins with first."""
    lines = [line[1:-1].split("|") for line in table.splitlines() if line[:1] == "|"]
    header, _, *rows = [[entry.strip() for entry in line] for line in lines]
    (found,) = [entries for entries in rows if entries[: len(first)] == first]
    return dict(zip(header, found, strict=True))


def test_readme_is_what_the_results_say():
    assert main(["report", "--check"]) == 0


def test_findings_quote_the_tables_and_name_their_results():
    text = (report.README.parent / "FINDINGS.md").read_text()
    shown = tables.tables(load_outcomes(RESULTS))
    ours, regions = re.subn(
        r"<!-- not of our runs: begin -->.*?<!-- [^>]* end -->", "", text, flags=re.DOTALL
    )
    assert regions == 2 and "not of our runs" not in ours
    decimal = r"(?<![\w.])\d+\.\d+(?![\w.])"
    assert set(re.findall(decimal, ours)) <= set(re.findall(decimal, shown))
    named = set(re.findall(r"\((results/[^)]+)\)", text))
    listed = subprocess.run(
        ["git", "ls-files", "results"],
        cwd=report.README.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert named and named <= set(listed.stdout.splitlines())


def test_full_matrix_has_paper_and_ours_and_commands_for_blanks(tmp_path):
    table = sections(tmp_path, RUNS)[tables.FULL]
    mnist = row(table, ["MNIST"])
    assert mnist["L-Softmax, m = 4"] == "0.31 / 0.35 ± 0.07 (2): λ annealed to 0, decay 0.0005"
    assert mnist["L-Softmax, m = 2"] == "0.32 / 0.38 (1): λ annealed to 0, decay 0.0005"
    assert mnist["hinge"] == "0.47 _r_ / `train mnist-hinge`"
    assert mnist["ArcFace"] == "`train mnist-arcface`"
    assert row(table, ["CIFAR100"])["L-Softmax, m = 3"] == "29.87 _r_ / `train cifar100-m3`"
    released = row(table, ["CIFAR10, released recipe"])
    assert released["softmax"] == "9.05 _r_ / `train released-cifar10-softmax`"
    faces = row(table, ["LFW, accuracy"])["L-Softmax, m = 4"]
    assert faces.startswith("98.71 / `train-faces --faces")
    assert "9.00" not in table


def test_every_entry_of_a_changed_run_says_its_λ_and_decay(tmp_path):
    runs = [
        *RUNS,
        run_of("mnist-m4", 0, 7.0, steps=8, pace="self-paced", weight_decay=0.001),
        run_of("mnist-softmax", 0, 6.0, steps=8),
        run_of("mnist-cosface", 0, 5.0, steps=8, scale=16.0),
        run_of("mnist-m2", 0, 5.0, steps=8, lam={"base": 0.0, "minimum": 0.0}),
        run_of("cifar10-m4", 0, 4.0, mirror=True),
    ]
    table = sections(tmp_path, [*runs, FACES])[tables.CHANGED]
    short = row(table, ["MNIST", "`--steps 8`"])
    assert short["L-Softmax, m = 4"].split("<br>") == [
        "8.00 (1): λ annealed to 0, decay 0.0005",
        "9.00 (1): λ annealed to 0, base 1, gamma 0.5, decay 0.0005",
        "7.00 (1): λ self-paced by batch, decay 0.001",
    ]
    assert short["softmax"] == "6.00 (1): decay 0.0005"
    assert short["CosFace"] == "5.00 (1): λ = 0, scale 16, decay 0.0005"
    assert short["L-Softmax, m = 2"] == "5.00 (1): λ = 0, decay 0.0005"
    mirrored = row(table, ["CIFAR10", "`--mirror`"])
    assert mirrored["L-Softmax, m = 4"] == "4.00 (1): λ annealed to 0, decay 0.0005"
    faces = row(table, ["LFW, accuracy"])["L-Softmax, m = 4"]
    assert faces == "90.00 (1 fold): λ minimum 30, decay 0.0005"


@pytest.mark.parametrize(
    "pace, said, seen, share",
    [
        ("self-paced", "λ self-paced by batch", {"lam": [None, 1.0]}, "25.0"),
        ("lead", "λ by lead, strength 0.8", {"share": [0.25, None]}, "12.5"),
    ],
)
def test_the_share_comes_from_what_the_log_has(pace, said, seen, share, tmp_path):
    log = {"train": {"step": [1, 2]} | seen}
    run = run_of("mnist-m4", 0, 7.0, steps=8, pace=pace) | {"curves": log}
    every = row(sections(tmp_path, [run])[tables.ALL], ["`mnist-m4`", f"8 updates, {said}"])
    assert every["share"] == share


def test_the_missing_runs_of_the_campaign_are_listed(tmp_path):
    tried = campaign.BATCHES["scales"][0]
    runs = [
        run_of("cifar10-softmax", 0, 12.0, mirror=True) | {"file": "cifar10-softmax/mirror-seed0"},
        run_of("cifar10-m4", 2, None) | {"file": "cifar10-m4/seed2"},
        run_of(tried.name, 0, 0.6, **changes_of(tried)) | {"file": f"tune/{run_name(tried)}"},
    ]
    for run in runs:
        result.save(tmp_path / f"{run['file']}.json", run)
    lines = tables.sections(load_outcomes(tmp_path))[tables.LEFT].splitlines()[1:-1]
    commands = [command_of(run) for runs in campaign.BATCHES.values() for run in runs]
    assert [line for line in lines if line[0] != "#"] == [
        command
        for command in commands
        if command
        not in (
            "python -m experiments train cifar10-softmax --mirror --seed 0",
            "python -m experiments train cifar10-m4 --seed 2",
            command_of(tried),
        )
    ]
    assert [line for line in lines if line[0] == "#"] == [f"# batch {b}" for b in campaign.BATCHES]


def test_every_cell_with_a_number_is_in_a_table(tmp_path):
    text = tables.tables(load_outcomes(tmp_path))
    for name, cell in CELLS.items():
        if cell.reported is not None:
            assert f"`train {name}`" in text
    assert re.findall("^### (.*)$", text, re.MULTILINE) == list(
        tables.sections(load_outcomes(tmp_path))
    )


def test_diverged_runs_stand_apart(tmp_path):
    found = sections(tmp_path, RUNS)
    diverged = found[tables.DIVERGED].splitlines()
    assert "| `mnist-m4` | λ annealed to 0 | 2 | 7 |" in diverged
    changed = "8 updates, λ annealed to 0, base 1, gamma 0.5"
    whole = row(found[tables.ALL], ["`mnist-m4`", changed])
    assert whole["test error %"] == "9.00" and whole["to the column"] == "10.0"


def test_runs_that_were_evaluated_often_show_how_the_error_moved(tmp_path):
    run = run_of("cifar10-softmax", 0, 2.0)
    often = [9.0] * 23 + [1.0, 2.0, 3.0, 2.0, 3.0, 2.0, 3.0]
    for name, errors, said in (("often", often, ("1.00", "0.55")), ("seldom", often[1:], ("", ""))):
        curves = {"test": {"step": list(range(len(errors))), "error": errors}, "train": {}}
        table = sections(tmp_path / name, [run | {"curves": curves}])[tables.ALL]
        shown = row(table, ["`cifar10-softmax`"])
        assert (shown["lowest"], shown["last six"]) == said


def test_tries_on_the_validation_split(tmp_path):
    tried = {"steps": 8, "validation": True}
    runs = [
        run_of("mnist-softmax", 0, 2.0, **tried),
        run_of("mnist-softmax", 0, 1.5, **tried, learning_rate=0.05),
        run_of("mnist-arcface", 0, 1.2, **tried, scale=16.0, pace="self-paced"),
    ]
    config = CONFIGS["mnist-m4"]
    schedules = [config.lam._asdict(), config.lam._replace(minimum=5.0)._asdict()]
    tuning = {
        "kind": "tuning",
        "config": replace(config, steps=8).to_json(),
        "best": schedules[1],
        "candidates": [
            {"lam": lam, "validation_errors": errors, "commands": [f"minimum {lam['minimum']}"]}
            for lam, errors in zip(schedules, ([2.0], [1.0, 1.5]), strict=True)
        ],
    }
    result.save(tmp_path / "tune" / "t.json", tuning)
    # A try of a tuning is listed once.
    runs.append(run_of("mnist-m4", 0, 2.0, **tried) | {"command": "minimum 5.0"})
    found = sections(tmp_path, [*runs, run_of("mnist-softmax", 0, 3.0, steps=8)])
    assert found[tables.VALIDATED].splitlines()[2:] == [
        "| `mnist-softmax` | 8 updates | 2.00 (1) |",
        "| `mnist-softmax` | 8 updates, learning rate 0.05 | 1.50 (1) |",
        "| `mnist-arcface` | 8 updates, λ self-paced by batch, scale 16 | 1.20 (1) |",
        "| `mnist-m4` | 8 updates, λ annealed to 0 | 2.00 (1) |",
        "| `mnist-m4` | 8 updates, λ annealed to 5 | **1.25 ± 0.35 (2)** |",
    ]


def test_verification_names_its_protocol_and_no_rate_it_did_not_measure(tmp_path):
    table = sections(tmp_path, [FACES])["LFW"]
    shown = row(table, ["`r0`", "unrestricted, no outside data", "5000", "600"])
    assert list(shown.values())[4:] == ["90.00 (1 fold)", "", "11.00", "0.9500", "0.1: 80.00"]
    rates = {"equal_error_rate": 0.2, "tar_at_far": {"0.0001": 0.1, "0.001": 0.4}}
    everybody = {"genuine": 1000, "impostors": 9000, "metrics": rates}
    table = sections(tmp_path / "all", [FACES | {"all_pairs": everybody}])["LFW"]
    shown = row(table, ["`r0`"])
    assert list(shown.values())[-5:] == ["10,000", "20.00", "0.001: 40.00", "", ""]


def test_view_1_is_listed_and_in_no_matrix(tmp_path):
    chosen = FACES | {"protocol": "LFW view 1, unrestricted"}
    found = sections(tmp_path, [chosen])
    assert "LFW view 1" in found["LFW"]
    assert "LFW" not in found[tables.CHANGED]


def test_a_network_that_went_on_from_softmax_says_so(tmp_path):
    went_on = FACES | {"training": {"command": "train-faces --margin 4 --init-from run"}}
    table = sections(tmp_path, [went_on])[tables.CHANGED]
    entry = row(table, ["LFW, accuracy"])["L-Softmax, m = 4"]
    assert entry == "90.00 (1 fold): λ minimum 30, from softmax, decay 0.0005"


def test_accuracy_is_compared_fold_by_fold_with_continued_softmax(tmp_path):
    def of_fold(fold, margin, accuracy, went_on, seed=0):
        command = "train-faces --init-from run" if went_on else "train-faces"
        metrics = FACES["metrics"] | {"accuracy": accuracy, "fold_accuracy": [accuracy]}
        return FACES | {
            "tested_folds": [fold],
            "config": FACES["config"] | {"margin": margin, "left_out_fold": fold, "seed": seed},
            "training": {"command": command},
            "metrics": metrics,
            "curve": {"false_accepts": [0.1], "true_accepts": [accuracy]},
        }

    softmax = [of_fold(f, 1, 0.8 + 0.05 * f, True) for f in range(3)]
    begun = [of_fold(f, 1, 0.7, False) for f in range(3)]
    for outcome in begun:
        outcome["config"] |= {"steps": 5}
    gains = (0.02, 0.01, 0.03)
    margin = [of_fold(f, 4, 0.8 + 0.05 * f + gains[f], True) for f in range(3)]
    # The order of the files' names is not the order of the folds.
    table = sections(tmp_path, [*softmax, *begun, *margin[::-1]])["LFW"]
    lines = [line.split(" | ") for line in table.splitlines()[2:]]
    # Student's t interval of 1, 2, 3 with two degrees of freedom: 2 ± 4.3027 / sqrt(3).
    assert sorted(line[5] for line in lines)[0] == ""
    assert "2.00 [-0.48, 4.48]" in [line[5] for line in lines]
    # A second seed gains 6, 3, 3: with the first, the folds gain 4, 2, 3.
    softmax += [of_fold(f, 1, 0.6 + 0.05 * f, True, seed=1) for f in range(3)]
    gains = (0.06, 0.03, 0.03)
    margin += [of_fold(f, 4, 0.6 + 0.05 * f + gains[f], True, seed=1) for f in range(3)]
    table = sections(tmp_path, [*softmax, *margin])["LFW"]
    assert "| 3.00 [0.52, 5.48]; by seed 2.00, 4.00 |" in table
    assert table.count("(3 folds, 2 seeds)") == 2


def test_the_front_page_has_no_table_of_a_result_that_is_missing(tmp_path):
    found = front.tables(tmp_path, [])
    assert [found[name] for name in ("training", "unseen", "cost")] == ["", "", ""]
    measured = {"date": "2026-11-29", "commit": 40 * "a", "device": "cpu, 2 cores"}
    runs = [
        {"task": task, "split": split, "policy": policy, "error": [1.0 + split], "eer": [4.0, 6.0]}
        for task, policy in (
            ("digits", "softmax"), ("digits", "self_paced()"), ("lfw", "softmax"),
        )
        for split in (0, 1)
    ]  # fmt: skip
    result.save(tmp_path / "open-set-cpu.json", measured | {"runs": runs})
    arm = {"arm": "head.loss(...).mean()", "ratio": [1.25, 1, 2], "memory_ratio": 0.5}
    peer = {"arm": "pytorch-metric-learning", "ratio": [3.0, 1, 5]}
    for minute, entry in enumerate(([{**arm, "ratio": [9.0]}], [arm, peer], [arm])):
        heads = measured | {"shapes": [{"shape": [2, 3, 4], "arms": entry}]}
        if minute == 0:  # a size that the latest result lacks
            heads["shapes"] += [{"shape": [2, 3, 1900], "arms": [arm]}]
        heads["date"] = f"2026-11-{20 + minute % 2}"
        result.save(tmp_path / f"head-cpu-f32-{minute}.json", heads)
    found = front.tables(tmp_path, grouped([run_of("mnist-m4", 0, 0.3)]))
    assert found["unseen"].splitlines()[2:4] == [
        "| softmax | 1.5 / 5.0 | 1.5 / 5.0 |",
        "| `self_paced()` | 1.5 / 5.0 |  |",
    ]
    lines = found["cost"].splitlines()
    assert lines[2:5] == [
        "| 2, 3, 4 | 1.25 x | 0.50 x | 3.0 x |  |  |  |",
        "| 2, 3, 1900 | 1.25 x | 0.50 x |  |  |  |  |",
        "",
    ]
    assert lines[5].startswith("*cpu, 2 cores, 2026-11-21, aaaaaaa, [result](")
    assert "; 1,900 classes: cpu, 2 cores, 2026-11-20, aaaaaaa, [result](" in lines[5]
    assert found["paper"].splitlines()[2:] == [
        "| MNIST | 0.40 / | 0.32 / | 0.31 / | 0.31 / 0.30 (1) |"
    ]


def test_report_writes_between_the_markers_and_checks(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    sections(tmp_path, RUNS)
    words = ["report", "--out", str(tmp_path), "--readme", str(readme)]
    assert main([*words, "--check"]) == 1 and "old" in readme.read_text()
    assert main(words) == 0 and main([*words, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "0.35 ± 0.07" in text and "old" not in text
    sections(tmp_path, [run_of("mnist-m4", 0, 0.5)])
    assert main([*words, "--check"]) == 1
    before = readme.read_text()
    assert main([*words, "--out", str(tmp_path / "mistyped")]) == 2
    assert "out must be a folder" in capsys.readouterr().err and readme.read_text() == before
    readme.write_text("no markers")
    assert main(words) == 2
    assert "must hold the lines" in capsys.readouterr().err
    readme.write_text(f"{BEGIN.replace(':', ', nothing:', 1)}\n{END}\n")
    assert main(words) == 2
    assert "a marker of no table, 'nothing'" in capsys.readouterr().err
