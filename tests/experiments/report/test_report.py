"""The report says what the results say, and nothing that was not run."""

import re
import subprocess
from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.paper.cells import CONFIGS
from experiments.report import report
from experiments.report.report import BEGIN, END
from experiments.store import results as result


def run_of(name, seed, error, **changes):
    status = "finished" if error is not None else "diverged"
    outcome = {
        "name": name,
        "seed": seed,
        "status": status,
        "diverged": None if error is not None else {"step": 7, "lam": 12.5},
        "reduced": bool(changes),
        "changes": changes,
        "device": "one GPU",
        "data": {"fingerprint": "same"},
    }
    if error is None:
        return outcome
    angles = {"target_angle": 10.04, "intra_class_angle": 8.0, "inter_class_angle": 90.0}
    return outcome | {"train": {"error": 0.0}, "test": {"error": error} | angles}


RUNS = [
    run_of("mnist-m4", 0, 0.30),
    run_of("mnist-m4", 1, 0.40),
    run_of("mnist-m4", 2, None),
    run_of("mnist-m2", 0, 0.375),
    run_of("mnist-m4", 0, 9.0, steps=8, lam={"base": 1.0, "gamma": 0.5}),
]
FACES = {
    "kind": "verification",
    "protocol": "unrestricted, no outside data",
    "pairs": 600,
    "tested_folds": [3],
    "people_trained_on": 5000,
    "metrics": {
        "accuracy": 0.9,
        "standard_error": None,
        "auc": 0.95,
        "equal_error_rate": 0.11,
        "tar_at_far": {"0.1": 0.8},
    },
}


def write(folder, outcomes):
    for number, outcome in enumerate(outcomes):
        result.save(folder / f"r{number}.json", outcome)


@pytest.fixture
def lines(tmp_path):
    write(tmp_path, [*RUNS, FACES])
    return report.tables(report.load_results(tmp_path)).splitlines()


def test_readme_is_what_the_results_say():
    assert main(["report", "--check"]) == 0


def test_findings_quote_the_tables_and_name_their_results():
    text = (report.README.parent / "FINDINGS.md").read_text()
    tables = report.README.read_text().partition(BEGIN)[2]
    decimal = r"(?<![\w.])\d+\.\d+(?![\w.])"
    assert set(re.findall(decimal, text)) <= set(re.findall(decimal, tables))
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


def test_cell_is_mean_and_sample_deviation_over_seeds(lines):
    mean_of_two = "| one GPU | 0.31 | 0.35 ± 0.07 | 0.00 ± 0.00 | 2 |"
    assert f"| `mnist-m4` | Table 2, MNIST, m4 | confirmed {mean_of_two}" in lines
    assert "| `mnist-m2` | Table 2, MNIST, m2 | confirmed | one GPU | 0.32 | 0.38 | 0.00 | 1 |" in (
        lines
    )


def test_what_did_not_run_is_blank(lines):
    assert "| `cifar10-hinge` | Table 3, CIFAR10, hinge | recalled |  | 9.91 |  |  |  |" in lines
    assert "| `fig7-32` | Fig. 7, 32 filters |  |  |  |  |  |  |" in lines


def test_reduced_and_diverged_runs_stand_apart(lines):
    changed = "steps 8, lam.base 1.0, lam.gamma 0.5"
    assert f"| `mnist-m4` | {changed} | one GPU | 9.00 | 0.00 | 10.0 | 8.0 | 90.0 | 1 |" in lines
    assert "| `mnist-m4` |  | 2 | 7 | 12.5 |" in lines


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
    write(tmp_path, [*softmax, *margin, *other, annealed])
    table = report.sections(report.load_results(tmp_path))[report.PAIRED].splitlines()[2:]
    assert table == [
        "| `mnist-m2` | steps 8 | -0.75 ± 0.35 | 2 of 2 |",
        "| `fig2-m3` |  | 1.00 | 0 of 1 |",
        "| `mnist-m4` | steps 8, lam.minimum 5.0 | -0.50 | 1 of 1 |",
    ]


def test_tunings_show_every_candidate_and_count_for_no_cell(tmp_path):
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
    candidate = run_of("mnist-m4", 0, 2.0, validation=True)
    write(tmp_path, [tuning, candidate])
    found = report.sections(report.load_results(tmp_path))
    assert found[report.TUNED].splitlines()[2:] == [
        "| `mnist-m4` | steps 8 | 1000 | 2.5e-05 | 35 | 0 | 2.00 | 1 |",
        "| `mnist-m4` | steps 8 | 1000 | 2.5e-05 | 35 | 5 | **1.25 ± 0.35** | 2 |",
    ]
    assert found[report.REDUCED].startswith("None yet.")


def test_verification_names_its_protocol(lines):
    row = "| `r5` | unrestricted, no outside data | 5000 | 600 in 1 | 90.00 | 11.00 | 0.9500 |"
    assert f"{row} 0.1: 80.00 |" in lines
    assert "| L-Softmax, m = 4 | confirmed | 98.71 |" in lines


def test_runs_on_different_data_have_no_mean(tmp_path):
    other = run_of("mnist-m4", 1, 0.40) | {"data": {"fingerprint": "other"}}
    write(tmp_path, [RUNS[0], other])
    with pytest.raises(ValueError, match=r"different data.*r0\.json, r1\.json"):
        report.tables(report.load_results(tmp_path))


def test_report_writes_between_the_markers_and_checks(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(tmp_path, RUNS)
    words = ["report", "--out", str(tmp_path), "--readme", str(readme)]
    assert main([*words, "--check"]) == 1 and "old" in readme.read_text()
    assert main(words) == 0 and main([*words, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "0.35 ± 0.07" in text and "old" not in text
    write(tmp_path, [run_of("mnist-m4", 0, 0.5)])
    assert main([*words, "--check"]) == 1
    (tmp_path / "torn.json").write_text("{")
    assert main([*words, "--check"]) == 2 and "torn.json must hold" in capsys.readouterr().err
    (tmp_path / "torn.json").unlink()
    before = readme.read_text()
    assert main([*words, "--out", str(tmp_path / "mistyped")]) == 2
    assert "out must be a folder" in capsys.readouterr().err and readme.read_text() == before
    readme.write_text("no markers")
    assert main(words) == 2
    assert "must hold the lines" in capsys.readouterr().err
