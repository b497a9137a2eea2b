"""The report says what the results say, and nothing that was not run."""

import re
import subprocess
from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.paper.cells import CELLS, CONFIGS
from experiments.report import protocol, report, tables
from experiments.report.outcomes import grouped, load_outcomes
from experiments.report.report import BEGIN, END
from experiments.store import results as result
from made_up import run_of

FACES = {
    "kind": "verification",
    "protocol": "unrestricted, no outside data",
    "pairs": 600,
    "tested_folds": [3],
    "people_trained_on": 5000,
    "config": {"margin": 4, "lam": [1000.0, 0.1, 1.0, 30.0]},
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
    """The entries of the row that begins so, by header."""
    lines = [line[1:-1].split("|") for line in table.splitlines() if line[:1] == "|"]
    header, _, *rows = [[entry.strip() for entry in line] for line in lines]
    (found,) = [entries for entries in rows if entries[: len(first)] == first]
    return dict(zip(header, found, strict=True))


def test_readme_is_what_the_results_say():
    assert main(["report", "--check"]) == 0


def test_findings_quote_the_tables_and_name_their_results():
    text = (report.README.parent / "FINDINGS.md").read_text()
    shown = report.README.read_text().partition(BEGIN)[2]
    before, _, rest = text.partition("<!-- not of our runs: begin -->")
    _, end, after = rest.partition("<!-- not of our runs: end -->")
    assert end
    decimal = r"(?<![\w.])\d+\.\d+(?![\w.])"
    assert set(re.findall(decimal, before + after)) <= set(re.findall(decimal, shown))
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
    assert mnist["m = 4"] == "0.31 / 0.35 ± 0.07 (2)"
    assert mnist["m = 2"] == "0.32 / 0.38 (1)"
    assert mnist["hinge"] == "0.47 _r_ / `train mnist-hinge`"
    assert row(table, ["CIFAR100"])["m = 3"] == "29.87 _r_ / `train cifar100-m3`"
    assert row(table, ["LFW, accuracy"])["m = 4"].startswith("98.71 / `train-faces --faces")
    assert "9.00" not in table


def test_reduced_matrix_has_a_row_a_reduction_and_a_line_a_λ(tmp_path):
    table = sections(tmp_path, [*RUNS, FACES])[tables.REDUCED]
    short = row(table, ["MNIST", "`--steps 8`"])
    assert short["m = 4"] == "0.31 / 8.00 (1)<br>9.00 (1): λ base 1, gamma 0.5"
    assert short["softmax"] == ""
    planned = row(table, ["MNIST", "`--steps 2000 --batch 128 --width 0.25`"])
    assert planned["m = 4"] == "0.31 / `train mnist-m4`<br>`train mnist-m4 --pace self-paced`"
    assert row(table, ["LFW, accuracy"])["m = 4"] == "98.71 / 90.00 (1 fold): λ minimum 30"


def test_what_the_protocol_still_wants():
    changes = {"steps": 2000, "batch": 128, "width": 0.25}
    before = protocol.left([])
    assert len(before) == sum(wanted.seeds for wanted in protocol.WANTED)
    assert before[0] == (
        "python -m experiments train mnist-hinge --steps 2000 --batch 128 --width 0.25 --seed 0"
    )
    tuned = run_of("mnist-hinge", 0, 1.0, **changes, learning_rate=0.05)
    paced = run_of("mnist-m4", 2, 1.0, **changes, pace="self-paced")
    wider = run_of("mnist-hinge", 1, 1.0, **changes | {"width": 0.5})
    after = protocol.left(grouped([tuned, paced, wider]))
    gone = [command for command in before if command not in after]
    assert len(gone) == 2 and "mnist-hinge" in gone[0]
    assert "mnist-m4 --pace self-paced" in gone[1] and gone[1].endswith("--seed 2")


def test_fig_7_is_planned_with_the_filters_of_the_protocol():
    planned = [wanted for wanted in protocol.WANTED if wanted.name.startswith("fig7")]
    networks = [replace(CONFIGS[w.name], width=w.width).built_network for w in planned]
    assert [network.stages[0].filters for network in networks] == [12, 16, 24, 32]


def test_every_cell_with_a_number_is_in_a_table(tmp_path):
    text = tables.tables(load_outcomes(tmp_path))
    for name, cell in CELLS.items():
        if cell.where != "quickstart":
            assert f"`train {name}`" in text
    assert text.count("<details>") == text.count("</details>") == 10


def test_diverged_runs_stand_apart(tmp_path):
    found = sections(tmp_path, RUNS)
    assert "| `mnist-m4` |  | 2 | 7 | 12.5 |" in found["Diverged runs"].splitlines()
    whole = row(found[tables.ALL], ["`mnist-m4`", "8 updates, λ base 1, gamma 0.5"])
    assert whole["test error %"] == "9.00" and whole["to the column"] == "10.0"


def test_losses_are_compared_seed_by_seed(tmp_path):
    softmax = [run_of("mnist-softmax", seed, error, steps=8) for seed, error in enumerate((2, 4))]
    margin = [
        run_of("mnist-m2", seed, error, steps=8) for seed, error in ((0, 1), (1, 3.5), (2, 9))
    ]
    other = [
        run_of("mnist-m2", 0, 1.0, steps=9),
        run_of("fig2-m1", 0, 5.0),
        run_of("fig2-m3", 0, 6),
    ]
    # λ changes nothing without a margin.
    annealed = run_of("mnist-m4", 0, 1.5, steps=8, lam={"minimum": 5.0})
    table = sections(tmp_path, [*softmax, *margin, *other, annealed])[tables.PAIRED]
    assert table.splitlines()[2:] == [
        "| `mnist-m2` | 8 updates |  | -0.75 ± 0.35 | 2 of 2 |",
        "| `mnist-m4` | 8 updates, λ minimum 5 |  | -0.50 | 1 of 1 |",
        "| `fig2-m3` |  |  | 1.00 | 0 of 1 |",
    ]


def test_a_tuned_softmax_is_what_margins_are_compared_with(tmp_path):
    tuned = run_of("mnist-softmax", 0, 2.0, steps=8, learning_rate=0.05)
    margin = run_of("mnist-m2", 0, 1.5, steps=8)
    table = sections(tmp_path / "one", [tuned, margin])[tables.PAIRED]
    assert table.splitlines()[2:] == [
        "| `mnist-m2` | 8 updates | learning rate 0.05 | -0.50 | 1 of 1 |"
    ]
    same = run_of("mnist-softmax", 0, 3.0, steps=8)
    table = sections(tmp_path / "two", [tuned, same, margin])[tables.PAIRED]
    assert table.splitlines()[2:] == ["| `mnist-m2` | 8 updates |  | -1.50 | 1 of 1 |"]


def test_learning_rates_and_scales_by_their_validation_error(tmp_path):
    tried = {"steps": 8, "validation": True}
    runs = [
        run_of("mnist-softmax", 0, 2.0, **tried),
        run_of("mnist-softmax", 0, 1.5, **tried, learning_rate=0.05),
        run_of("mnist-m4", 0, 1.0, **tried),
        run_of("mnist-arcface", 0, 1.2, **tried, scale=16.0),
        run_of("mnist-softmax", 0, 3.0, steps=8),
    ]
    assert sections(tmp_path, runs)[tables.RATES].splitlines()[2:] == [
        "| `mnist-softmax` | 8 updates | 0.1 |  | 2.00 | 1 |",
        "| `mnist-softmax` | 8 updates | 0.05 |  | 1.50 | 1 |",
        "| `mnist-arcface` | 8 updates | 0.1 | 16 | 1.20 | 1 |",
    ]


def test_tunings_show_every_candidate(tmp_path):
    config = CONFIGS["mnist-m4"]
    schedules = [config.lam._asdict(), config.lam._replace(minimum=5.0)._asdict()]
    tuning = {
        "kind": "tuning",
        "config": replace(config, steps=8).to_json(),
        "best": schedules[1],
        "candidates": [
            {"lam": lam, "validation_errors": errors}
            for lam, errors in zip(schedules, ([2.0], [1.0, 1.5]), strict=True)
        ],
    }
    found = sections(tmp_path / "tune", [tuning])
    assert found[tables.TUNED].splitlines()[2:] == [
        "| `mnist-m4` | 8 updates | 1000 | 2.5e-05 | 35 | 0 | 2.00 | 1 |",
        "| `mnist-m4` | 8 updates | 1000 | 2.5e-05 | 35 | 5 | **1.25 ± 0.35** | 2 |",
    ]


def test_verification_names_its_protocol_and_no_rate_it_did_not_measure(tmp_path):
    table = sections(tmp_path, [FACES])["LFW"]
    shown = row(table, ["`r0`", "unrestricted, no outside data", "5000", "600"])
    assert list(shown.values())[4:] == ["90.00 (1 fold)", "11.00", "0.9500", "0.1: 80.00"]


def test_view_1_is_listed_and_in_no_matrix(tmp_path):
    chosen = FACES | {"protocol": "LFW view 1, unrestricted"}
    found = sections(tmp_path, [chosen])
    assert "LFW view 1" in found["LFW"]
    assert set(row(found[tables.REDUCED], ["LFW, accuracy"]).values()) == {
        "LFW, accuracy",
        "a few hundred people of LFW",
        "",
    }


def test_a_network_that_went_on_from_softmax_says_so(tmp_path):
    went_on = FACES | {"training": {"command": "train-faces --margin 4 --init-from run"}}
    table = sections(tmp_path, [went_on])[tables.REDUCED]
    entry = row(table, ["LFW, accuracy"])["m = 4"]
    assert entry == "98.71 / 90.00 (1 fold): λ minimum 30, from softmax"


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
