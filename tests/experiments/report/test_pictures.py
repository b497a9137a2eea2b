"""Pictures show what the formulas and the results say."""

import numpy as np
from matplotlib.colors import to_rgba

from experiments.faces import stand_in
from experiments.faces.embed import Embeddings
from experiments.faces.images import list_faces
from experiments.report import pictures


def literal_psi(theta, margin):
    k = np.minimum(np.floor(theta * margin / np.pi), margin - 1)
    return (-1) ** k * np.cos(margin * theta) - 2 * k


def test_targets_go_from_the_cosine_to_psi():
    panels = pictures.targets(margins=(1, 3), lambdas=(np.inf, 5.0, 0.0)).axes
    for panel, share in zip(panels, (0, 1 / 6, 1), strict=True):
        for line, margin in zip(panel.lines, (1, 3), strict=True):
            theta = np.radians(line.get_xdata())
            expected = (1 - share) * np.cos(theta) + share * literal_psi(theta, margin)
            np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-4)


def test_regions_have_a_row_a_margin_and_a_column_a_λ():
    panels = pictures.regions(margins=(2, 4), lambdas=(np.inf, 0.0)).axes
    assert [panel.get_ylabel() for panel in panels[::2]] == ["m = 2", "m = 4"]
    assert [panel.get_title() for panel in panels[:2]] == [
        "λ = ∞, softmax",
        "λ = 0, the full margin",
    ]


def test_training_shows_the_curves_of_both_runs():
    def run(loss):
        names = ("loss", "error", "target_angle", "lam")
        curve = {"step": [1, 2]} | {name: [loss + i, 0.5] for i, name in enumerate(names)}
        return {"curves": {"train": curve}}

    figure = pictures.training({"one": run(3.0), "two": run(7.0)})
    shown = [[line.get_ydata()[0] for line in panel.lines] for panel in figure.axes]
    assert shown == [[3, 7], [4, 8], [5, 9], [6, 10]]


def test_agreement_is_the_distance_from_the_first_way():
    losses = {"one device": np.array([2.0, 1.0]), "two": np.array([2.5, 0.75])}
    left, right = pictures.agreement(losses).axes
    assert len(left.lines) == 2
    (line,) = right.lines
    assert line.get_ydata().tolist() == [0.5, 0.25]


def test_neighbours_are_the_nearest_about_the_mean_framed_by_person(tmp_path):
    stand_in.write_digits(tmp_path, images=3)
    listed = list_faces(tmp_path)
    names = np.array(listed.names[:6])  # eight, eight, eight, five, five, five
    rows = [[1, 0.2], [-1, -0.1], [1, 0], [-1, -0.2], [1, 0.1], [-1, 0]]
    embeddings = Embeddings(names, np.array(rows) + [100, 0])
    figure = pictures.neighbours(listed, embeddings, queries=1, nearest=2)
    query, *others = figure.axes
    assert query.get_title() == "eight"
    frames = [panel.spines["left"].get_edgecolor() for panel in others]
    # The image shown is the third; nearest are the fifth, of another, and the first.
    assert frames == [to_rgba("tab:red"), to_rgba("tab:green")]
    assert [panel.get_title() for panel in others] == ["1.00", "0.98"]
