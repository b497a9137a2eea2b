"""Made-up results, in the format that runs write."""

from typing import Any

from experiments.paper.cells import CONFIGS


def run_of(name: str, seed: int, error: float | None, **changes: Any) -> dict[str, Any]:
    """A finished run, or a diverged run if error is None."""
    named = CONFIGS[name].to_json()
    if "lam" in changes:
        changes = changes | {"lam": named["lam"] | changes["lam"]}
    outcome = {
        "name": name,
        "seed": seed,
        "status": "finished" if error is not None else "diverged",
        "diverged": None if error is not None else {"step": 7, "lam": 12.5},
        "reduced": bool(changes),
        "changes": changes,
        "config": named | changes | {"seed": seed},
        "device": "one GPU",
        "data": {"fingerprint": "same"},
    }
    if error is None:
        return outcome
    angles = {"target_angle": 10.04, "intra_class_angle": 8.0, "inter_class_angle": 90.0}
    test = {"error": error} | angles
    return outcome | {"train": {"error": 0.0}, "test": test, "curves": {}}
