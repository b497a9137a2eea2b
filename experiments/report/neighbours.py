"""Faces beside their nearest neighbours."""

import numpy as np
from matplotlib.figure import Figure

from experiments.faces.embed import Embeddings
from experiments.faces.images import Faces, open_face
from experiments.paper.measures import unit


def neighbours(faces: Faces, embeddings: Embeddings, queries: int = 5, nearest: int = 7) -> Figure:
    """Images, a row each, and the nearest others: framed green if of the same person.

    Nearness is the cosine about the mean, as in `verify`.

    Args:
      faces: the folder that was embedded.
      embeddings: of its images; the rows shown are evenly apart.
      queries: how many images.
      nearest: how many others beside each.
    """
    people = [name.partition("/")[0] for name in embeddings.names.tolist()]
    rows = np.linspace(0, len(people) - 1, queries + 2).astype(int)[1:-1]
    directions = unit(embeddings.embeddings - embeddings.embeddings.mean(axis=0))
    cosines = directions[rows] @ directions.T
    size = 1.15 * (nearest + 1), 1.32 * queries + 0.3
    figure = Figure(figsize=size, layout="constrained")
    for row, line, panels in zip(
        rows, cosines, figure.subplots(queries, nearest + 1, squeeze=False), strict=True
    ):
        closest = [image for image in np.argsort(-line) if image != row][:nearest]
        for panel, shown in zip(panels, [row, *closest], strict=True):
            panel.imshow(open_face(faces.read(embeddings.names[shown])))
            panel.set(xticks=(), yticks=())
            panel.spines[:].set_visible(True)
            right = people[shown] == people[row]
            panel.spines[:].set(color="tab:green" if right else "tab:red", linewidth=2.5)
            panel.set_title(f"{line[shown]:.2f}", fontsize=8)
        panels[0].spines[:].set(color="0.3", linewidth=1)
        panels[0].set_title(people[row].replace("_", " "), fontsize=7)
    return figure
