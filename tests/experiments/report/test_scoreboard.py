"""`list`: the paper's number, ours, and the command of a blank, in unbroken lines."""

from experiments.__main__ import main
from experiments.paper.cells import CELLS
from experiments.store import results as result
from made_up import run_of


def test_every_cell_in_one_line_of_a_pipe(tmp_path, capsys):
    runs = [run_of("mnist-m4", seed, error) for seed, error in enumerate((0.3, 0.4))]
    runs += [run_of("mnist-m4", 0, 9.0, steps=8), run_of("mnist-m4", 0, 3.0, steps=9, width=0.5)]
    for number, run in enumerate(runs):
        result.save(tmp_path / f"{number}.json", run)
    assert main(["list", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    lines = [[part.strip() for part in line.split("│")[1:-1]] for line in said.splitlines()]
    board = {line[0]: line for line in lines if len(line) == 6}
    assert CELLS.keys() <= board.keys()
    assert board["mnist-m4"][2:] == [
        "0.31 confirmed",
        "0.35 ± 0.07 (2)",
        "3.00 (1): 9 updates, width 0.5",
        "",
    ]
    assert board["cifar10-hinge"][2:] == ["9.91 recalled", "", "", "train cifar10-hinge"]
    faces = ["", "LFW, m4", "98.71 confirmed", "", ""]
    assert [*faces, "train-faces --faces FACES --margin 4 --out RUN"] in lines
    assert "recalled: its text was not at hand" in said
