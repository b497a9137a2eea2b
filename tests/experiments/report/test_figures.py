"""Figures show what results hold and the loss computes; what has no run is named, not drawn."""

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.__main__ import main
from experiments.paper import measures as measure
from experiments.paper.cells import CONFIGS
from experiments.report import figures, style
from experiments.store import results as result

FOLDER = "figures-reduced"


def made_up(config, seed):
    rng = np.random.default_rng(seed)
    length = 2 if config.network == "mnist-2d" else 8
    kernel = rng.normal(size=(length, config.classes))
    labels = np.arange(2 * config.classes) % config.classes
    features = kernel.T[labels] + rng.normal(size=(len(labels), length))
    measured = measure.measures(features, features @ kernel, labels, kernel)
    curve = {"step": [1, 2, 3], "error": [90.0, 50.0 + seed, 10.0]}
    return {
        "name": config.name,
        "seed": seed,
        "status": "finished",
        "reduced": True,
        "train": measured,
        "test": measured,
        "curves": {"train": curve, "test": curve},
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of made-up results of every configuration but one, with its figures."""
    out = tmp_path_factory.mktemp("results")
    for config in CONFIGS.values():
        if config.name != "fig7-128":
            for seed in range(2):
                result.save(out / f"{config.name}-{seed}.json", made_up(config, seed))
    assert main(["figures", "--out", str(out), "--reduced"]) == 0
    return out


@pytest.fixture(scope="module")
def runs():
    return {c.name: [made_up(c, seed) for seed in range(2)] for c in CONFIGS.values()}


def test_every_figure_is_a_png(drawn):
    names = sorted(file.name for file in (drawn / FOLDER).iterdir())
    assert names == sorted(
        f"{name}.png"
        for name, drawing in figures.DRAWINGS.items()
        if drawing.needs and name != "fig7"
    )


def test_figures_without_runs_are_named_and_left_out(drawn, capsys, monkeypatch):
    some = {name: figures.DRAWINGS[name] for name in ("fig2", "fig3", "fig7")}
    monkeypatch.setattr(figures, "DRAWINGS", some)
    assert main(["figures", "--out", str(drawn)]) == 0
    said = capsys.readouterr().out
    assert "fig2 left out, no finished run of fig2-m1, fig2-m2, fig2-m3, fig2-m4\n" in said
    assert {file.stem for file in (drawn / "figures").iterdir()} == {"fig3"}
    assert main(["figures", "--out", str(drawn), "--reduced"]) == 0
    assert "fig7 left out, no finished run of fig7-128\n" in capsys.readouterr().out


def test_same_results_give_the_same_bytes(drawn, runs):
    with rc_context(style.STYLE):
        for name in ("first", "second"):
            style.write(figures.draw_curves(runs, figures.FIG7_LINES), drawn / f"{name}.png")
    assert (drawn / "first.png").read_bytes() == (drawn / "second.png").read_bytes()


def test_fig2_shows_stored_features_of_both_splits(runs):
    panels = figures.draw_planes(runs).axes
    assert len(panels) == 8
    measured = runs["fig2-m3"][0]["test"]
    shown = np.concatenate([points.get_offsets() for points in panels[6].collections])
    assert {tuple(point) for point in shown} == {tuple(point) for point in measured["points"]}
    assert f"test accuracy {100 - measured['error']:.2f} %" in panels[6].get_title()


def test_fig3_is_psi_by_its_formula():
    (panel,) = figures.draw_psi({}).axes
    for margin, line in zip((1, 2, 3, 4), panel.lines, strict=True):
        theta, psi = np.radians(line.get_xdata()), line.get_ydata()
        k = np.minimum(np.floor(theta * margin / np.pi), margin - 1)
        np.testing.assert_allclose(psi, (-1) ** k * np.cos(margin * theta) - 2 * k, atol=1e-4)


@pytest.mark.parametrize("lengths", figures.LENGTHS.values())
def test_fig4_boundary_is_where_the_angles_say(lengths):
    kernel = figures.plane_kernel(lengths)
    angles = np.arctan2(kernel[1], kernel[0])
    # |W1| cos(2 theta1) = |W2| cos(theta2) while theta1 is below 90 degrees, and the other way.
    for label in (0, 1):
        other = 1 - label
        ring = np.linspace(angles[1], angles[0], 4001)
        features = np.stack([np.cos(ring), np.sin(ring)], axis=-1).astype(np.float32)
        ahead = figures.lead(features, kernel, label, 2)
        literal = lengths[label] * np.cos(2 * (ring - angles[label]))
        literal -= lengths[other] * np.cos(ring - angles[other])
        np.testing.assert_allclose(ahead, literal, atol=1e-5)
        assert (ahead > 0).any() and (ahead < 0).any()


def test_fig4_regions_overlap_nowhere_with_a_margin():
    features = np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 2), axis=-1).astype(np.float32)
    for lengths in figures.LENGTHS.values():
        kernel = figures.plane_kernel(lengths)
        won = [figures.lead(features, kernel, label, 2) > 1e-6 for label in (0, 1)]
        assert not (won[0] & won[1]).any() and (~won[0] & ~won[1]).sum() > 100


def test_fig5_sums_seeds_and_counts_by_label(runs):
    figure = figures.draw_confusions(runs, "cifar10")
    counts = sum(np.array(o["test"]["confusion"]) for o in runs["cifar10-m4"])
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(shown, 100 * counts / counts.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("lines", [figures.FIG6_LINES, figures.FIG7_LINES])
def test_figs_6_and_7_are_mean_error_against_iteration(runs, lines):
    figure = figures.draw_curves(runs, lines)
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    for panel in figure.axes:
        assert panel.get_xlabel() == "iteration" and len(panel.lines) == 4
        assert panel.lines[0].get_xydata().tolist() == [[1, 90], [2, 50.5], [3, 10]]
