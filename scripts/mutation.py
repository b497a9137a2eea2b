"""Mutants of the library, and how many of them its tests notice.

    python scripts/mutation.py [SAMPLE] [SEED] [JOBS] [RESULT.json]

cosmic-ray says what can be changed. Of every module takes part a seeded share of its mutants, at
least a few; each runs the doctests of its module and the files of tests that `TESTS` names, up to
the first that fails. Left out are changes of annotations, of the text of messages, and those that
any test dies of: arithmetic that becomes bitwise, comparisons that become `is`.

Mutants run in copies under the folder mutation/, where mutants.jsonl has what came out of each:
a run that was stopped goes on, a larger sample contains the smaller one. AGAIN=1 runs those again
that survived. A `why` that was written beside a survivor in RESULT.json stays there.
"""

import ast
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import chex  # noqa: F401  what tests import is imported once, before the forks
import mpmath  # noqa: F401  the same
import optax  # noqa: F401  the same
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from flax import linen, nnx  # noqa: F401  the same

from experiments.store.results import provenance, save

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "mutation"
FEWEST = 4
SECONDS = 400  # of the processor
HEAD = "labels logits loss_values loss_degenerate loss_range loss_masks"
TESTS = {
    "_checks": "bad_calls labels loss_mistakes loss_masks logits schedule sgd",
    "_fused": "loss_values loss_degenerate loss_masks self_paced loss_precision loss_plans",
    "_head": "modules bad_calls sharded",
    "_pace": "self_paced",
    "_placement": "logits modules sharded loss_transforms training",
    "_plans": "loss_plans loss_values loss_degenerate self_paced bad_calls plans_hlo sampled",
    "_tiles": "tiles logits",
    "devices": "training bad_calls",
    "interop": "interop bad_calls",
    "linen": "modules bad_calls sharded",
    "logits": f"{HEAD} margin_family loss_precision bad_calls tiles plans_hlo",
    "loss": f"{HEAD} loss_plans self_paced bad_calls loss_transforms",
    "margins": "margins margin_family bad_calls logits",
    "nnx": "modules bad_calls sharded",
    "sampled": "sampled bad_calls",
    "schedule": "schedule self_paced bad_calls",
    "sgd": "sgd bad_calls",
    "sharded": "sharded self_paced bad_calls modules margin_family",
    "training": "training bad_calls",
}
UNCHANGED = "unchanged"
BITWISE = ("RShift", "LShift", "BitOr", "BitAnd", "BitXor")


@dataclass(frozen=True)
class Mutant:
    module: str
    line: int
    function: str
    operator: str
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.module} {self.line} {self.operator}: {self.after}"


def wanted(operator: str) -> bool:
    kind = operator.split("/")[-1].split("_")
    if kind[0] == "ReplaceBinaryOperator":
        return (kind[1] in BITWISE) == (kind[2] in BITWISE)
    if kind[0] == "ReplaceComparisonOperator":
        return kind[1] in ("Is", "IsNot") or kind[2] not in ("Is", "IsNot")
    # The third puts a name that is not there, and fails on dotted ones.
    return kind[-1] not in ("Invert", "VariableInserter", "VariableReplacer", "ExceptionReplacer")


def left_out(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations and the texts of messages begin and end."""
    nodes: list[ast.AST | None] = []
    for node in ast.walk(tree):
        nodes += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        nodes += [node] if isinstance(node, ast.JoinedStr) else []
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in nodes
        if isinstance(node, ast.expr)
    ]


def places_of(module: str) -> list[tuple[str, int, int]]:
    """Operator, occurrence and line of every mutant."""
    source = source_of(module)
    spans, parsed, found = left_out(ast.parse(source)), get_ast(source), []
    for name in filter(wanted, operator_names()):
        operator = get_operator(name)()
        places = [
            place for node in ast_nodes(parsed) for place in operator.mutation_positions(node)
        ]
        for occurrence, (start, _) in enumerate(places):
            if not any(begin <= start < end for begin, end in spans):
                found.append((name, occurrence, start[0]))
    return found


def mutant_at(module: str, name: str, occurrence: int, line: int) -> Mutant | None:
    source = source_of(module)
    changed = mutate_code(source, get_operator(name)(), occurrence)
    try:
        compile(changed, module, "exec")
    except SyntaxError:
        return None
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    around = [f.name for f in functions if f.lineno <= line <= (f.end_lineno or 0)]
    before, after = difference(source.splitlines(), changed.splitlines())
    kind = name.removeprefix("core/")
    return Mutant(module, line, around[-1] if around else "", kind, before, after, changed)


def source_of(module: str) -> str:
    return (ROOT / "lsoftmax_jax" / f"{module}.py").read_text()


def difference(old: list[str], new: list[str]) -> tuple[str, str]:
    first = next(i for i, (a, b) in enumerate(zip([*old, ""], [*new, ""], strict=False)) if a != b)
    return old[first].strip(), "" if len(new) < len(old) else new[first].strip()


def sampled(size: int, seed: int) -> tuple[list[Mutant], dict[str, int]]:
    """The mutants to run, all modules in turn, and how many there are in each module."""
    places = {module: places_of(module) for module in TESTS}
    totals = {module: len(of_one) for module, of_one in places.items()}
    drawn = []
    for module, of_one in places.items():
        random.Random(f"{seed} {module}").shuffle(of_one)
        share = max(FEWEST, round(size * len(of_one) / sum(totals.values())))
        mutants = filter(None, (mutant_at(module, *place) for place in of_one))
        drawn += [(i / share, mutant) for i, mutant in enumerate(islice(mutants, share))]
    return [mutant for _, mutant in sorted(drawn, key=lambda pair: pair[0])], totals


class FirstFailure:
    """A plugin for pytest that remembers which test failed."""

    test = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.test:
            self.test = report.nodeid or "collection"


def copied(number: int) -> Path:
    """A copy of the library and its tests."""
    copy = FOLDER / str(number)
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("lsoftmax_jax", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "experiments")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def begun(module: str, source: str, copy: Path) -> int:
    """A process that tests a mutant in a copy: 0 if it survives."""
    target = copy / "lsoftmax_jax" / f"{module}.py"
    target.write_text(source)
    shutil.rmtree(copy / "lsoftmax_jax" / "__pycache__", ignore_errors=True)
    if (child := os.fork()) != 0:
        return child
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    signal.alarm(10 * SECONDS)
    silent = os.open(copy / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(silent, 1), os.dup2(silent, 2)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.startswith(("lsoftmax_jax", "experiments"))]:
        del sys.modules[name]
    sys.path.insert(0, str(copy))
    files = [f"lsoftmax_jax/{module}.py"]
    files += [f"tests/lsoftmax_jax/test_{name}.py" for name in TESTS[module].split()]
    first = FirstFailure()
    # pytest's plugins are here already.
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, *files], plugins=[first])
    (copy / "failed").write_text(first.test)
    there = str(sys.modules["lsoftmax_jax"].__file__).startswith(str(copy))
    os._exit(int(code) if there else 99)


def outcome(status: int, copy: Path) -> dict[str, Any]:
    code = os.waitstatus_to_exitcode(status)
    assert code != 99, f"the library was not that of {copy}"
    if code == 0:
        return {"outcome": "survived"}
    if code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return {"outcome": "timeout"}
    failed = copy / "failed"
    return {"outcome": "killed", "by": failed.read_text() if failed.exists() else f"exit {code}"}


def run(mutants: list[Mutant], jobs: int) -> None:
    copies = [copied(number) for number in range(jobs)]
    children: dict[int, tuple[Mutant, Path, float]] = {}
    originals = {module: source_of(module) for module in TESTS}
    waiting, done = list(mutants), 0
    with (FOLDER / "mutants.jsonl").open("a") as log:
        while waiting or children:
            while waiting and copies:
                mutant, copy = waiting.pop(0), copies.pop()
                (copy / "failed").unlink(missing_ok=True)
                child = begun(mutant.module, mutant.source, copy)
                children[child] = mutant, copy, time.monotonic()
            child, status, usage = os.wait4(-1, 0)
            mutant, copy, since = children.pop(child)
            copies.append(copy)
            done += 1
            entry = asdict(mutant) | outcome(status, copy)
            del entry["source"]
            if mutant.operator == UNCHANGED and entry["outcome"] != "survived":
                raise RuntimeError(f"{mutant.module} fails unchanged: {copy / 'said'}")
            entry["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
            log.write(json.dumps(entry | {"name": mutant.name}) + "\n")
            log.flush()
            (copy / "lsoftmax_jax" / f"{mutant.module}.py").write_text(originals[mutant.module])
            said = f"{entry['outcome']} {entry['cpu_seconds']} s of {time.monotonic() - since:.0f}"
            print(f"{done}/{len(mutants)} {said}: {mutant.name}", flush=True)


def unchanged() -> list[Mutant]:
    return [Mutant(module, 0, "", UNCHANGED, "", "", source_of(module)) for module in TESTS]


def results(names: set[str]) -> dict[str, dict[str, Any]]:
    file = FOLDER / "mutants.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    entries = [json.loads(line) for line in lines]
    return {entry["name"]: entry for entry in entries if entry["name"] in names}


def needed(mutant: Mutant, known: dict[str, dict[str, Any]]) -> bool:
    if mutant.name not in known:
        return True
    return bool(os.environ.get("AGAIN")) and known[mutant.name]["outcome"] == "survived"


def mutation(size: int, seed: int, jobs: int, result: Path | None) -> int:
    FOLDER.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(FOLDER / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["CI"] = "1"  # hypothesis draws the same examples
    mutants, totals = sampled(size, seed)
    print(f"{len(mutants)} of {sum(totals.values())} mutants", flush=True)
    names = {mutant.name for mutant in mutants}
    known = results(names)
    run([mutant for mutant in mutants if needed(mutant, known)], jobs)
    known = results(names | {mutant.name for mutant in unchanged()})
    # Where a mutant survived, the tests have passed.
    passed = {entry["module"] for entry in known.values() if entry["outcome"] == "survived"}
    run([mutant for mutant in unchanged() if mutant.module not in passed], jobs)
    found = results(names)
    counts: dict[str, Counter[str]] = {module: Counter() for module in TESTS}
    for entry in found.values():
        counts[entry["module"]][entry["outcome"]] += 1
    all_of = sum(counts.values(), Counter())
    survivors = [entry for entry in found.values() if entry["outcome"] == "survived"]
    print(f"{dict(all_of)}: {1 - all_of['survived'] / len(found):.1%} noticed")
    if result is not None:
        why = {}
        if result.exists():
            earlier = json.loads(result.read_text())["survivors"]
            why = {(e["module"], e["before"], e["after"]): e.get("why", "") for e in earlier}
        shown = ("module", "line", "function", "operator", "before", "after")
        listed = [
            {key: entry[key] for key in shown}
            | {"why": why.get((entry["module"], entry["before"], entry["after"]), "")}
            for entry in sorted(survivors, key=lambda e: (e["module"], e["line"]))
        ]
        modules = {
            module: {"mutants": totals[module], "run": sum(count.values()), **count}
            for module, count in counts.items()
        }
        facts = {"kind": "mutation", "tool": f"cosmic-ray {version('cosmic-ray')}", "seed": seed}
        facts |= {"mutants": sum(totals.values()), "sampled": len(mutants), "run": len(found)}
        facts |= all_of
        facts |= {"commit": provenance(1)["commit"], "load": os.getloadavg()[0]}
        save(result, facts | {"modules": modules, "survivors": listed})
    return int(all_of["survived"] > 0.1 * len(found))


if __name__ == "__main__":
    given = sys.argv[1:]
    numbers = [int(number) for number in given[:3]]
    size, seed, jobs = [*numbers, *[400, 0, 2][len(numbers) :]]
    sys.exit(mutation(size, seed, jobs, Path(given[3]) if given[3:] else None))
