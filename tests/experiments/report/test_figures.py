"""Figures show stored results and computed losses; a figure without runs is named, not drawn."""

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imread

from experiments.__main__ import main
from experiments.paper import measures as measure
from experiments.paper import style
from experiments.paper.cells import CONFIGS
from experiments.report import figures
from experiments.report.outcomes import grouped
from experiments.store import results as result
from made_up import run_of

FOLDER = "figures-reduced"


def made_up(config, seed):
    rng = np.random.default_rng(seed)
    length = 2 if config.network == "mnist-2d" else 8
    kernel = rng.normal(size=(length, config.classes))
    labels = np.arange(2 * config.classes) % config.classes
    features = kernel.T[labels] + rng.normal(size=(len(labels), length))
    measured = measure.measures(features, features @ kernel, labels, kernel)
    curve = {"step": [1, 2, 3], "error": [90.0, 50.0 + seed, 10.0]}
    changes = {"steps": 3, "width": 0.25}
    return run_of(config.name, seed, 1.0, **changes) | {
        "train": measured,
        "test": measured,
        "curves": {"train": curve, "test": curve},
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of made-up results of every configuration but three, with its figures."""
    out = tmp_path_factory.mktemp("results")
    for config in CONFIGS.values():
        if config.name not in ("fig7-128", "cifar10plus-m4", "fig2-m3"):
            for seed in range(2):
                result.save(out / config.name / f"{seed}.json", made_up(config, seed))
    assert main(["figures", "--out", str(out), "--reduced"]) == 0
    return out


@pytest.fixture(scope="module")
def found():
    runs = [made_up(config, seed) for config in CONFIGS.values() for seed in range(2)]
    return grouped(runs)


def of(names, found):
    """The groups of some configurations."""
    return [group for group in found if group.name in names]


def shown(name, found):
    """Draws a figure of the paper from the groups that it needs."""
    drawing = figures.DRAWINGS[name]
    return drawing.draw(of(drawing.needs, found))


def test_every_figure_with_enough_runs_is_a_png(drawn):
    names = {file.name for file in (drawn / FOLDER).iterdir()}
    with_runs = {f"{name}.png" for name, drawing in figures.DRAWINGS.items() if drawing.needs}
    assert names == with_runs - {"fig5-cifar10plus.png", "fig2.png"}
    for name in names:
        assert imread(drawn / FOLDER / name).std() > 0.05, "an empty picture"


def test_figures_without_runs_are_named_and_left_out(drawn, capsys, monkeypatch):
    some = {name: figures.DRAWINGS[name] for name in ("fig2", "fig7")}
    monkeypatch.setattr(figures, "DRAWINGS", some)
    assert main(["figures", "--out", str(drawn)]) == 0
    said = capsys.readouterr().out
    assert "fig2 left out, no finished run of fig2-m1, fig2-m2, fig2-m3, fig2-m4\n" in said
    assert not (drawn / "figures").exists()
    assert main(["figures", "--out", str(drawn), "--reduced"]) == 0
    said = capsys.readouterr().out
    assert "fig2 left out, no finished run of fig2-m3\n" in said
    assert "fig7.png written, without fig7-128\n" in said


def test_a_network_that_was_verified_on_two_files_has_two_curves(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "roc_figure", lambda named: drawn.update(named) or Figure())
    network = {"margin": 1, "width": 0.25, "steps": 600, "seed": 1}
    measured = {"tested_folds": [0], "metrics": {}, "curve": {}, "people_trained_on": 9}
    for name in ("lfw", "cfp_fp"):
        outcome = {"kind": "verification", "protocol": "not stated", "pairs": 6, **measured}
        outcome |= {"verified": [f"{name}.bin"], "config": network}
        result.save(tmp_path / f"{name}.json", outcome)
    assert main(["figures", "--out", str(tmp_path)]) == 0
    assert sorted(drawn) == [
        f"softmax, width 0.25, 600 updates, seed 1, {name}.json" for name in ("cfp_fp", "lfw")
    ]
    (tmp_path / "lfw.json").unlink()
    drawn.clear()
    assert main(["figures", "--out", str(tmp_path)]) == 0
    assert list(drawn) == ["softmax, width 0.25, 600 updates, seed 1"]


def test_same_results_give_the_same_bytes(drawn, found):
    with rc_context(style.STYLE):
        for name in ("first", "second"):
            style.write(shown("fig7", found), drawn / f"{name}.png")
    assert (drawn / "first.png").read_bytes() == (drawn / "second.png").read_bytes()


@pytest.mark.parametrize(("reduced", "said"), [(True, "Reduced runs"), (False, "Full runs: ")])
def test_a_figure_says_which_runs_it_shows(found, reduced, said):
    here = of(("fig7-32", "fig7-64"), found)
    assert figures.how(here) == "3 updates, width 0.25, batch 256, seeds 0, 1"
    assert figures.how(here, "width") == "3 updates, batch 256, seeds 0, 1"
    full = grouped([run_of("mnist-m4", 0, 1.0)])
    assert figures.how(full) == "18,000 updates, width 1, batch 256, seed 0"
    figure = shown("fig7", found)
    style.mark_runs(figure, figures.how(here), reduced)
    assert said in figure.get_suptitle() and "3 updates" in figure.get_suptitle()


def test_a_loss_has_one_colour_in_every_figure():
    colors = [loss.color for loss in style.LOSSES.values()]
    assert len(set(colors)) == len(colors)
    runs = [
        made_up(CONFIGS[name], seed)
        for name in ("cifar100-softmax", "cifar100-m2", "cifar100-m4", "mnist-softmax", "mnist-m4")
        for seed in range(2)
    ]
    paced = made_up(CONFIGS["mnist-m4"], 0)
    paced["changes"] = paced["changes"] | {"pace": "self-paced"}
    groups = grouped([*runs, paced])
    drawn = {}
    for data in ("cifar100", "mnist"):
        group = [g for g in groups if g.data == data]
        lines = figures.draw_losses(group).axes[1].lines
        assert [line.get_color() for line in lines] == [style.LOSSES[g.loss].color for g in group]
        drawn[data] = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert drawn["mnist"] == [("0.35", "-"), ("tab:red", "-"), ("tab:red", "--")]
    assert drawn["cifar100"][2] == ("tab:red", "-")


def test_a_figure_shows_the_longest_of_equally_reduced_runs():
    def group(name, **changes):
        (made,) = grouped([run_of(name, 0, 1.0, **changes)])
        return made

    short = [group("cifar10-softmax", steps=5), group("cifar10-m4", steps=5)]
    long = [
        group("cifar10-softmax", steps=9, learning_rate=0.05),
        group("cifar10-m4", steps=9, pace="self-paced"),
        group("cifar10-m4", steps=9),
    ]
    alone = [group("cifar10-m4", steps=11), group("cifar100-softmax", steps=11)]
    drawing = figures.DRAWINGS["fig5-cifar10"]
    chosen = figures.chosen(drawing, [*short, *long, *alone])
    assert chosen == long
    assert [figures.label(g) for g in long] == [
        "softmax, learning rate 0.05, 1 seed",
        "L-Softmax, m = 4, λ self-paced by batch, 1 seed",
        "L-Softmax, m = 4, λ annealed to 0, 1 seed",
    ]


def test_fig2_shows_stored_features_of_both_splits_at_one_scale(found):
    panels = np.array(shown("fig2", found).axes).reshape(2, 4)
    measured = of(("fig2-m3",), found)[0].runs[0]["test"]
    panel = panels[1, 2]
    points = np.concatenate([dots.get_offsets() for dots in panel.collections])
    assert {tuple(point) for point in points} == {tuple(point) for point in measured["points"]}
    assert f"test accuracy {100 - measured['error']:.2f} %" in panel.get_title()
    assert len({(p.get_xlim(), p.get_ylim()) for p in panels.flat}) == 1
    assert [p.get_ylabel() for p in panels[:, 0]] == ["second feature"] * 2
    assert [p.get_xlabel() for p in panels[1]] == ["first feature"] * 4


def test_no_line_reaches_its_digit(found):
    panel = shown("fig2", found).axes[0]
    width = panel.get_xlim()[1]
    for line, digit in zip(panel.lines, panel.texts, strict=True):
        end = np.linalg.norm(line.get_xydata(), axis=1).max()
        assert np.linalg.norm(digit.get_position()) - end > 0.05 * width
    longest = max(np.linalg.norm(dots.get_offsets(), axis=1).max() for dots in panel.collections)
    assert longest < 0.85 * width


def test_fig5_sums_seeds_and_counts_by_label(found):
    figure = shown("fig5-cifar10", found)
    (margin,) = of(("cifar10-m4",), found)
    counts = sum(np.array(run["test"]["confusion"]) for run in margin.runs)
    share = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(share, 100 * counts / counts.sum(axis=1, keepdims=True))
    titles = ["softmax, 2 seeds", "L-Softmax, m = 4, λ annealed to 0, 2 seeds"]
    assert [panel.get_title() for panel in figure.axes[:2]] == titles


LEGENDS = {
    "fig6": [
        "softmax, 2 seeds",
        *(f"L-Softmax, m = {m}, λ annealed to 5, 2 seeds" for m in (2, 3, 4)),
    ],
    "fig7": [f"{filters} filters, λ annealed to 0" for filters in (8, 16, 24, 32)],
}


@pytest.mark.parametrize("name", LEGENDS)
def test_figs_6_and_7_are_mean_error_against_iteration(found, name):
    figure = shown(name, found)
    training, test = figure.axes
    assert training.get_ylabel().startswith("training error") and test.get_ylabel() == "test error"
    for panel in (training, test):
        assert panel.get_xlabel() == "iteration" and len(panel.lines) == 4
        assert panel.lines[0].get_xydata().tolist() == [[1, 90], [2, 50.5], [3, 10]]
    assert [text.get_text() for text in test.get_legend().get_texts()] == LEGENDS[name]


LOOK = {"color": "0.5", "label": "both"}


def test_curves_of_different_devices_are_compared_at_the_same_iterations():
    def run(steps, errors):
        curve = {"step": steps, "error": errors}
        return {"curves": {"train": curve, "test": curve}}

    figure = figures.draw_curves([([run([1, 3], [4.0, 2.0]), run([1, 2, 3], [6.0, 5, 0])], LOOK)])
    assert figure.axes[1].lines[0].get_xydata().tolist() == [[1, 5], [3, 1]]


def test_running_mean_is_over_a_twentieth_of_the_points():
    values = np.arange(60.0)
    mean = figures.running_mean(values)
    np.testing.assert_allclose(mean[1:-1], values[1:-1])
    np.testing.assert_allclose(mean[[0, -1]], [0.5, 58.5])
