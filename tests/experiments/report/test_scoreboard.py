"""`list`: the paper's number, ours, and the numbers of changed runs."""

import re

from experiments.__main__ import main
from experiments.paper.cells import CELLS
from experiments.store import results as result
from made_up import run_of


def test_a_pipe_gets_one_line_for_each_cell(tmp_path, capsys):
    runs = [run_of("mnist-m4", seed, error) for seed, error in enumerate((0.3, 0.4))]
    runs += [
        run_of("mnist-m4", 0, 9.0, steps=8),
        run_of("mnist-m4", 0, 3.0, steps=9, width=0.5),
        run_of("mnist-m4", 0, 4.0, steps=9, width=0.5, pace="self-paced"),
    ]
    for number, run in enumerate(runs):
        result.save(tmp_path / f"{number}.json", run)
    assert main(["list", "--out", str(tmp_path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {line.partition(" ")[0] for line in lines} >= CELLS.keys()
    at = "decay 0.0005, 9 updates, width 0.5"
    first = lines.index(f"mnist-m4 0.31 0.35 ± 0.07 (2) 3.00 (1): λ annealed to 0, {at}")
    assert lines[first + 1] == f"mnist-m4 4.00 (1): λ self-paced by batch, {at}"
    assert "cifar10-hinge 9.91 r" in lines and "LFW, m4 98.71" in lines
    assert not any("9.00" in line for line in lines)


def test_the_list_fits_the_width_of_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    result.save(tmp_path / "0.json", run_of("mnist-m4", 0, 4.0, steps=9, pace="self-paced"))
    assert main(["list", "--out", str(tmp_path)]) == 0
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, said.splitlines())) <= 80 and "λ self-paced" in said
