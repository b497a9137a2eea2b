"""The picture shows the nearest neighbours by the embeddings."""

import numpy as np
from matplotlib.colors import to_rgba

from experiments.faces import stand_in
from experiments.faces.embed import Embeddings
from experiments.faces.images import list_faces
from experiments.report.neighbours import neighbours


def test_neighbours_are_the_nearest_about_the_mean_framed_by_person(tmp_path):
    stand_in.write_digits(tmp_path, images=3)
    listed = list_faces(tmp_path)
    names = np.array(listed.names[:6])  # eight, eight, eight, five, five, five
    rows = [[1, 0.2], [-1, -0.1], [1, 0], [-1, -0.2], [1, 0.1], [-1, 0]]
    embeddings = Embeddings(names, np.array(rows) + [100, 0])
    figure = neighbours(listed, embeddings, queries=1, nearest=2)
    query, *others = figure.axes
    assert query.get_title() == "eight"
    frames = [panel.spines["left"].get_edgecolor() for panel in others]
    # The third image is shown. Its nearest are the fifth, of another person, and the first.
    assert frames == [to_rgba("tab:red"), to_rgba("tab:green")]
    assert [panel.get_title() for panel in others] == ["1.00", "0.98"]
