"""Verifies the face pairs of a file, and all pairs of the same people; writes a table and a JSON.

LFW lists 600 pairs a fold, too few to tell two networks apart. The fold's people make hundreds of
thousands of pairs. Both verifications fit their mean and PCA on the listed pairs of other folds.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.faces import embed
from experiments.faces.bins import read_bin
from experiments.faces.images import FaceImages, Faces, list_faces, rows_of
from experiments.faces.protocol import (
    Pairs,
    Verification,
    fitted,
    people_of_fold,
    read_pairs,
    verify,
)
from experiments.faces.train import load_run
from experiments.store.claims import command_line
from experiments.store.results import load, provenance, save
from lsoftmax_jax import verification
from lsoftmax_jax.verification import Roc

PIXELS = (28, 24)
FALSE_ACCEPT_RATES = (1e-3, 1e-2)
CURVE_POINTS = 100
LOWEST_RATE = 1e-3


class Source(NamedTuple):
    """Embeddings, the people they were learned from, and the settings that the result records."""

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
      pairs: files of pairs in LFW's formats, `pairs.txt` of view 2 or both files of view 1; folds
        are numbered through all files. All pairs of the tested folds' people are verified too, fold
        by fold.
      bin: a test set of insightface, such as lfw.bin, cfp_fp.bin or agedb_30.bin, for --checkpoint
        and --pixels. It holds the images too, and names nobody: only you can know whether the
        checkpoint was trained on its people.
      faces: folder of person/image.jpg, for --checkpoint and --pixels with --pairs.
      embeddings: an .npz of names and embeddings, from embed or elsewhere. Only the images in
        it take part.
      checkpoint: folder of a run of train-faces. Folds with people it was trained on are skipped.
      pixels: use small grey images as embeddings; any network should beat them.
      components: how many principal components to keep, fitted on the other folds; by default all.
      protocol: name of the protocol, for the result, such as "unrestricted, no outside data".
      batch: images at a time, on all devices together.
    """
    if out.exists() and load(out).get("kind") != "verification":
        raise ValueError(f"{out} holds another result; name another file, or move this one")
    if (bin is None) == (not pairs):
        raise ValueError("expected exactly one of --pairs and --bin")
    if (embeddings is not None) + (checkpoint is not None) + pixels != 1:
        raise ValueError("expected exactly one of --embeddings, --checkpoint and --pixels")
    if bin is not None:
        if embeddings is not None or faces is not None:
            raise ValueError("--bin holds the images: give neither --embeddings nor --faces")
        named, listed = read_bin(bin)
        source = embedded(named, None, checkpoint, batch)
    else:
        listed = read_pairs(*pairs)
        if embeddings is not None:
            if faces is not None:
                raise ValueError("--embeddings needs no --faces: only its images take part")
            seen = embed.load_embeddings(embeddings)
            source = Source(seen, frozenset(), {"embeddings": embeddings.name})
        elif faces is None:
            raise ValueError(
                "--checkpoint and --pixels need --faces, the folder of person/image.jpg"
            )
        else:
            source = embedded(list_faces(faces), listed, checkpoint, batch)
    tested = untrained_folds(listed, source.trained_on)
    names, vectors = source.embeddings
    first, second = np.split(vectors[rows_of([*listed.first, *listed.second], names)], 2)
    result = verify(first, second, listed.same, listed.fold, components=components, tested=tested)
    people = None
    if bin is None:
        people = all_pairs_outcome(all_pairs(listed, source.embeddings, tested, components))
    outcome = {
        "kind": "verification",
        "protocol": protocol,
        "verified": [path.name for path in (pairs if bin is None else (bin,))],
        "tested_folds": tested,
        "pairs": int(np.isin(listed.fold, tested).sum()),
        "people_trained_on": len(source.trained_on),
        "command": command_line(),
        "config": source.config | {"components": components},
        "training": source.training,
        "seed": source.config.get("seed"),
        **provenance(jax.device_count()),
        "metrics": metrics(result),
        "curve": curve(result.roc),
        "all_pairs": people,  # None for --bin, which names nobody
    }
    save(out, outcome)
    print_table(outcome)
    print(f"{out} written; figures --out {out.parent} draws its ROC")


def untrained_folds(pairs: Pairs, trained_on: frozenset[str]) -> list[int]:
    """Returns the folds that contain nobody in trained_on.

    Raises:
      ValueError: there is no such fold.
    """
    folds: list[int] = np.unique(pairs.fold).tolist()
    clean = [fold for fold in folds if trained_on.isdisjoint(people_of_fold(pairs, fold))]
    if not clean:
        raise ValueError(
            "the checkpoint was trained on people of every fold, so that no fold tests it; "
            "train-faces --left-out-fold leaves the people of one out"
        )
    return clean


def all_pairs(
    pairs: Pairs, embeddings: embed.Embeddings, tested: list[int], components: int | None = None
) -> list[verification.Verification]:
    """Verifies all pairs of images of a fold's people, for each tested fold."""
    names, vectors = embeddings
    first, second = np.split(rows_of([*pairs.first, *pairs.second], names), 2)
    person = np.array([person_of(name) for name in names])

    def of_fold(fold: int) -> verification.Verification:
        known = np.concatenate([rows[pairs.fold != fold] for rows in (first, second)])
        rows = np.isin(person, list(people_of_fold(pairs, fold)))
        projected = fitted(vectors[known], components).transform(vectors[rows])
        return verification.verify(projected, person[rows])

    return [of_fold(fold) for fold in tested]


def metrics(result: Verification) -> dict[str, Any]:
    """Returns a result's numbers for JSON, which has no NaN."""
    error = result.standard_error
    return {
        "accuracy": result.accuracy,
        "standard_error": error if math.isfinite(error) else None,
        "fold_accuracy": result.fold_accuracy.tolist(),
        "fold_threshold": result.fold_threshold.tolist(),
        **rates(result.roc),
    }


def rates(roc: Roc) -> dict[str, Any]:
    """AUC, EER and TAR at FAR of a ROC."""
    return {
        "auc": roc.auc,
        "equal_error_rate": roc.eer,
        "tar_at_far": {f"{far:g}": roc.tar_at(far) for far in FALSE_ACCEPT_RATES},
    }


def all_pairs_outcome(folds: list[verification.Verification]) -> dict[str, Any]:
    """All pairs of each fold's people for JSON: counts are sums over folds, numbers are means."""
    numbers = [
        {"metrics": {**rates(seen.roc), "rank_1": seen.rank_1}, "curve": curve(seen.roc)}
        for seen in folds
    ]
    means = jax.tree.map(lambda *values: float(np.mean(values)), *numbers)
    counts = np.sum([(seen.roc.genuine, seen.roc.impostors) for seen in folds], axis=0).tolist()
    return {"genuine": counts[0], "impostors": counts[1], **means}


def curve(roc: Roc) -> dict[str, list[float]]:
    """Returns TAR at false accept rates that are evenly spaced on a logarithmic axis."""
    far = np.geomspace(LOWEST_RATE, 1, CURVE_POINTS)
    tar = np.array([roc.tar_at(min(rate, 1.0)) for rate in far.tolist()])
    return {"false_accepts": far.round(6).tolist(), "true_accepts": tar.round(6).tolist()}


def print_table(outcome: dict[str, Any]) -> None:
    """Prints the accuracy of each fold, and the error rates of the listed and of all pairs."""
    seen, everybody = outcome["metrics"], outcome["all_pairs"]
    folds = Table("fold", "accuracy", "threshold")
    numbers = zip(
        outcome["tested_folds"], seen["fold_accuracy"], seen["fold_threshold"], strict=True
    )
    for fold, accuracy, threshold in numbers:
        folds.add_row(str(fold), f"{accuracy:.4f}", f"{threshold:.4f}")
    folds.add_section()
    error = "" if seen["standard_error"] is None else f" ± {seen['standard_error']:.4f}"
    folds.add_row("mean", f"{seen['accuracy']:.4f}{error}")
    columns = {f"{outcome['pairs']:,} listed pairs": seen}
    if everybody is not None:
        every = everybody["genuine"] + everybody["impostors"]
        columns[f"all {every:,} pairs"] = everybody["metrics"]
    errors = Table("", *columns)
    for name, of in (("AUC", "auc"), ("EER", "equal_error_rate")):
        errors.add_row(name, *(f"{numbers[of]:.4f}" for numbers in columns.values()))
    for far in seen["tar_at_far"]:
        both = (numbers["tar_at_far"][far] for numbers in columns.values())
        errors.add_row(f"TAR at FAR {far}", *(f"{tar:.4f}" for tar in both))
    if everybody is not None:
        errors.add_row("rank 1", "", f"{everybody['metrics']['rank_1']:.4f}")
    Console().print(folds, errors)


def embedded(faces: Faces, pairs: Pairs | None, checkpoint: Path | None, batch: int) -> Source:
    """Embeds images by a run's network or, without a run, as pixels.

    Args:
      pairs: embed only the images that `needed` names; None embeds all.
    """
    run = None if checkpoint is None else load_run(checkpoint)
    trained_on = frozenset() if run is None else run.people
    if pairs is not None:
        faces = needed(pairs, faces, untrained_folds(pairs, trained_on))
    if run is None:
        seen = embed.embed_faces(FaceImages(faces, PIXELS), embed.grey_pixels, batch)
        return Source(seen, trained_on, {"pixels": list(PIXELS)})
    images, updates = FaceImages(faces, run.recipe.size), {"updates": int(run.state.step)}
    seen = embed.embed_faces(images, *embed.run_features(run, batch))
    return Source(seen, trained_on, run.recipe.to_json(), run.begun | updates)


def person_of(name: str) -> str:
    """The person of person/image.jpg in composed form, as in pairs: macOS decomposes names."""
    return normalize("NFC", name.split("/")[0])


def needed(pairs: Pairs, faces: Faces, tested: list[int]) -> Faces:
    """Selects the images that pairs name, and every image of the people in the tested folds.

    Raises:
      ValueError: images of pairs are missing; raised before the long work begins.
    """
    people = frozenset().union(*(people_of_fold(pairs, fold) for fold in tested))
    chosen = np.array([person_of(name) in people for name in faces.names])
    chosen[rows_of([*pairs.first, *pairs.second], faces.names)] = True
    rows = np.flatnonzero(chosen)
    names = tuple(faces.names[row] for row in rows)
    return faces._replace(names=names, labels=faces.labels[rows])
