"""Verifies faces: embeddings of a folder scored on a file of pairs, as table and JSON."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.faces import embed
from experiments.faces.bins import read_bin
from experiments.faces.images import FaceImages, Faces, list_faces, rows_of
from experiments.faces.protocol import Pairs, Verification, people_of_fold, read_pairs, verify
from experiments.faces.train import load_run
from experiments.store.claims import command_line
from experiments.store.results import provenance, save

PIXELS = (28, 24)
CURVE_POINTS = 100
LOWEST_RATE = 1e-3


class Source(NamedTuple):
    """Embeddings, the people they were learned from, and what they are, for the record."""

    embeddings: embed.Embeddings
    trained_on: frozenset[str]
    config: dict[str, Any]
    training: dict[str, Any] | None = None


def verify_faces(
    out: Path,
    pairs: tuple[Path, ...] = (),
    bin: Path | None = None,
    faces: Path | None = None,
    embeddings: Path | None = None,
    checkpoint: Path | None = None,
    pixels: bool = False,
    components: int | None = None,
    protocol: str = "not stated",
    batch: int = 256,
) -> None:
    """Verifies pairs of faces by one of --embeddings, --checkpoint or --pixels.

    The pairs are those of --pairs or of --bin.

    Args:
      out: the .json of the result. `figures --out` with its folder draws the ROC.
      pairs: files of pairs in LFW's formats, `pairs.txt` of view 2 or both files of view 1; the
        folds are counted through all of them.
      bin: a test set of insightface, such as lfw.bin, cfp_fp.bin or agedb_30.bin, for --checkpoint
        and --pixels. It holds the images too, and names nobody: that the checkpoint was not trained
        on its people is yours to know.
      faces: folder of person/image.jpg, for --checkpoint and --pixels with --pairs.
      embeddings: an .npz of names and embeddings, from embed or elsewhere.
      checkpoint: folder of a run of train-faces. Folds with people it was trained on are skipped.
      pixels: take small grey images as embeddings, the least that any network should beat.
      components: how many principal components to keep, fitted on the other folds; by default all.
      protocol: name of the protocol, for the result, such as "unrestricted, no outside data".
      batch: images at a time, on all devices together.
    """
    if (bin is None) == (not pairs):
        raise ValueError("expected exactly one of --pairs and --bin")
    if (embeddings is not None) + (checkpoint is not None) + pixels != 1:
        raise ValueError("expected exactly one of --embeddings, --checkpoint and --pixels")
    if bin is not None:
        if embeddings is not None or faces is not None:
            raise ValueError("--bin holds the images: give neither --embeddings nor --faces")
        named, listed = read_bin(bin)
        source = embedded(named, checkpoint, batch)
    else:
        listed = read_pairs(*pairs)
        if embeddings is not None:
            seen = embed.load_embeddings(embeddings)
            source = Source(seen, frozenset(), {"embeddings": embeddings.name})
        elif faces is None:
            raise ValueError(
                "--checkpoint and --pixels need --faces, the folder of person/image.jpg"
            )
        else:
            source = embedded(_only(listed, list_faces(faces)), checkpoint, batch)
    tested = untrained_folds(listed, source.trained_on)
    names, vectors = source.embeddings
    first, second = np.split(vectors[rows_of([*listed.first, *listed.second], names)], 2)
    result = verify(first, second, listed.same, listed.fold, components=components, tested=tested)
    outcome = {
        "kind": "verification",
        "protocol": protocol,
        "tested_folds": tested,
        "pairs": int(np.isin(listed.fold, tested).sum()),
        "people_trained_on": len(source.trained_on),
        "command": command_line(),
        "config": source.config | {"components": components},
        "training": source.training,
        "seed": source.config.get("seed"),
        **provenance(jax.device_count()),
        "metrics": metrics(result),
        "curve": curve(result),
    }
    save(out, outcome)
    print_table(result, tested)
    print(f"{out} written; figures --out {out.parent} draws its ROC")


def untrained_folds(pairs: Pairs, trained_on: frozenset[str]) -> list[int]:
    """The folds none of whose people was trained on.

    Raises:
      ValueError: if there is none.
    """
    folds: list[int] = np.unique(pairs.fold).tolist()
    clean = [fold for fold in folds if trained_on.isdisjoint(people_of_fold(pairs, fold))]
    if not clean:
        raise ValueError(
            "the checkpoint was trained on people of every fold, so that no fold tests it; "
            "train-faces --left-out-fold leaves the people of one out"
        )
    return clean


def metrics(result: Verification) -> dict[str, Any]:
    """A result's numbers for JSON, which knows no NaN."""
    error = result.standard_error
    return {
        "accuracy": result.accuracy,
        "standard_error": error if math.isfinite(error) else None,
        "fold_accuracy": result.fold_accuracy.tolist(),
        "fold_threshold": result.fold_threshold.tolist(),
        "auc": result.auc,
        "equal_error_rate": result.equal_error_rate,
        "tar_at_far": {f"{far:g}": tar for far, tar in result.tar_at_far.items()},
    }


def curve(result: Verification) -> dict[str, list[float]]:
    """The ROC at rates of false accepts evenly apart on a logarithmic axis."""
    rates = np.geomspace(LOWEST_RATE, 1, CURVE_POINTS)
    last = np.searchsorted(result.false_accepts, rates, side="right") - 1
    accepts = result.true_accepts[last]
    return {"false_accepts": rates.round(6).tolist(), "true_accepts": accepts.round(6).tolist()}


def print_table(result: Verification, tested: list[int]) -> None:
    """Folds and totals."""
    table = Table("fold", "accuracy", "threshold")
    for row in zip(tested, result.fold_accuracy, result.fold_threshold, strict=True):
        table.add_row(str(row[0]), f"{row[1]:.4f}", f"{row[2]:.4f}")
    table.add_section()
    error = f" ± {result.standard_error:.4f}" if len(tested) > 1 else ""
    table.add_row("mean", f"{result.accuracy:.4f}{error}")
    table.add_row("AUC", f"{result.auc:.4f}")
    table.add_row("EER", f"{result.equal_error_rate:.4f}")
    for far, tar in result.tar_at_far.items():
        table.add_row(f"TAR at FAR {far:g}", f"{tar:.4f}")
    Console().print(table)


def embedded(named: Faces, checkpoint: Path | None, batch: int) -> Source:
    """Embeds images by a run's network or, without a run, as pixels."""
    if checkpoint is None:
        seen = embed.embed_faces(FaceImages(named, PIXELS), embed.grey_pixels, batch)
        return Source(seen, frozenset(), {"pixels": list(PIXELS)})
    run = load_run(checkpoint)
    images, updates = FaceImages(named, run.recipe.size), {"updates": int(run.state.step)}
    seen = embed.embed_faces(images, *embed.run_features(run, batch))
    return Source(seen, run.people, run.recipe.to_json(), run.begun | updates)


def _only(pairs: Pairs, faces: Faces) -> Faces:
    """The faces that pairs name; all of those must be there before the long work begins."""
    rows = np.unique(rows_of([*pairs.first, *pairs.second], faces.names))
    names = tuple(faces.names[row] for row in rows)
    return faces._replace(names=names, labels=faces.labels[rows])
