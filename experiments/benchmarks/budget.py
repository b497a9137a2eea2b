"""Measures a new accelerator, the most useful numbers first: `python -m experiments bench all`.

Every piece is a command in a process of its own: this one leaves the accelerator alone, which not
all of them share.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiments.benchmarks import arms
from experiments.benchmarks.head import SHAPES
from experiments.benchmarks.records import OUT, appended, repeating
from experiments.store.results import save

CLONE = Path(__file__).parents[2]
MILLION = (4096, 512, 1_000_000)
# A platform may get these wrong: values, gradients, half precision, sharding, updates.
TESTS = ("values", "precision", "range", "plans", "masks")
TEST_FILES = tuple(f"tests/lsoftmax_jax/test_loss_{name}.py" for name in TESTS)
LAST_TESTS = tuple(f"tests/lsoftmax_jax/test_{name}.py" for name in ("sgd", "sharded", "training"))
ASK = "from experiments.store.results import provenance as p; import jax, json; "
ASK += "print(json.dumps({'backend': jax.default_backend(), **p(jax.device_count())}))"


def bench(minutes: float = 10.0, quick: bool = False, out: Path = OUT / "all") -> int:
    """Measures head and step and runs tests, the most useful first, until the minutes are over.

    The same command goes on where it was stopped, as long as commit, versions and device are the
    same. What failed is tried again.

    Args:
      minutes: after which to stop; the piece that runs then is lost.
      quick: only one tiny piece of each kind, to see that it works.
      out: folder of the results: of the head one file a dtype, of the steps, and of this command.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be > 0, got {minutes}")
    deadline, out = time.monotonic() + 60 * minutes, out.resolve()
    device = json.loads(output([sys.executable, "-c", ASK]))
    backend = device.pop("backend")
    file = out / f"all-{backend}.json"
    known = {"kind": "bench all", "command": repeating("all", minutes=minutes), **device}
    kept = [piece for piece in appended(file, known, (), "pieces") if piece["code"] == 0]
    listed = pieces(backend, out, quick)
    done = {piece["name"] for piece in kept}
    if done:
        print(f"continues: {len(done)} of {len(listed)} pieces are done")
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", backend)}
    for name, words in listed.items():
        left = deadline - time.monotonic()
        if name in done:
            continue
        if left <= 0:
            break
        print(f"{name}, {left / 60:.1f} minutes left", flush=True)
        begun = time.monotonic()
        code, said = outcome([sys.executable, "-m", *words], environment, left)
        if code is None:
            print(f"{name}: the minutes were over")
            break
        piece = {"name": name, "code": code, "seconds": round(time.monotonic() - begun, 1)}
        kept.append(piece | {"said": said})
        save(file, known | {"pieces": kept})
        print(f"{name}: {'done' if code == 0 else 'FAILED'} after {piece['seconds']:.0f} s; {said}")
    missing = [name for name in listed if name not in {p["name"] for p in kept}]
    failed = [piece["name"] for piece in kept if piece["code"]]
    if missing:
        print(f"{len(missing)} of {len(listed)} pieces are left; the same command goes on")
    print(f"{file} written" if kept else "nothing was finished")
    return 1 if failed or not kept else 0


def pieces(backend: str, out: Path, quick: bool) -> dict[str, list[str]]:
    """Modules and their arguments, by the name of what they measure, the most useful first."""

    def head(shape: tuple[int, int, int], dtype: str, only: tuple[str, ...] = ()) -> list[str]:
        file = out / f"head-{backend}-{dtype}.json"
        words = ["experiments", "bench", "head", "--shapes", *map(str, shape), "--dtype", dtype]
        return [*words, "--append", str(file), *(["--only", *only] if only else [])]

    def step(*flags: str) -> list[str]:
        return ["experiments", "bench", "step", *flags, "--out", str(out)]

    if quick:
        few = head((16, 8, 12), "f32", (arms.PLAIN, arms.ONE_SHOT))
        small = ["--batch", "4", "--width", "0.0625", "--repetitions", "2"]
        return {
            "head": [*few, "--repetitions", "2"],
            "step": step("--configurations", "mnist-m4", *small),
            "tests": tests("tests/lsoftmax_jax/test_tiles.py"),
        }
    found: dict[str, list[str]] = {}
    sizes = (*SHAPES, MILLION)
    # First a few arms of every size, then all arms.
    for title, everything in (("main arms", False), ("all arms", True)):
        for dtype in ("bf16", "f32"):
            for shape in sorted(sizes, key=lambda size: -size[2]):
                only = () if everything else main_arms(shape)
                found[f"head {shape} {dtype}, {title}"] = head(shape, dtype, only)
        if not everything:
            found["step"] = step()
            found["tests of the losses"] = tests(*TEST_FILES)
    found["tests of updates and meshes"] = tests(*LAST_TESTS)
    return found


def main_arms(shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Arms in blocks only where `head` has them."""
    blocks = shape[2] > 10_000
    return tuple(name for name in arms.MAIN if blocks or name != arms.RECOMPUTED)


def tests(*files: str) -> list[str]:
    return ["pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *files]


def output(command: list[str]) -> str:
    """The last line that a command prints.

    Raises:
      ValueError: with what it said, if it fails.
    """
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"no device answers: {done.stderr[-1000:]}")
    return done.stdout.strip().splitlines()[-1]


def outcome(
    command: list[str], environment: dict[str, str], seconds: float
) -> tuple[int | None, str]:
    """Exit code and last line of a command; no code if the time was over before it ended."""
    try:
        done = subprocess.run(
            command, cwd=CLONE, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return None, ""
    said = done.stderr if done.returncode and done.stderr.strip() else done.stdout
    return done.returncode, (said.strip().splitlines() or [""])[-1][:300]
