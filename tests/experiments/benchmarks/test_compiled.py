"""Heads and steps, compiled for accelerators; nothing runs, so load does not matter.

Those marked `aot` need the extra aot-tpu.
"""

import json
import sys
from pathlib import Path

import jax
import pytest

from experiments.__main__ import main
from experiments.benchmarks import arms, compiled, hlo, largest, notebooks, records, targets
from experiments.benchmarks.arms import Shape

pytestmark = pytest.mark.usefixtures("compiled_as_for_users")

CLONE = Path(__file__).parents[3]
README = (CLONE / "README.md").read_text()
GUIDE = (CLONE / "docs" / "guide" / "accelerators.md").read_text()


def aot(test):
    lacks = "libtpu" not in targets.compilers()
    missing = pytest.mark.skipif(lacks, reason="no libtpu: extra aot-tpu")
    return pytest.mark.aot(missing(test))


def program(target, name, size):
    """The result row of one program."""
    on = targets.target(target)
    cases = [case for case in compiled.head_cases(on) if (case.name, case.size) == (name, size)]
    return compiled.compiled_row(on, cases[0])


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(targets, "compilers", dict)
    for target, extra in (("v5e:2x4", "aot-tpu"), ("h100", "aot-gpu")):
        assert main(["compile", "--targets", target]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and extra in error and target in error


@pytest.mark.parametrize("name", ["v5x:2x4", "h100:2x4", ""])
def test_an_unknown_target_is_named(name, capsys):
    assert main(["compile", "--targets", name]) == 2
    assert repr(name) in capsys.readouterr().err


def test_every_rate_has_its_source():
    for chip in targets.CHIPS.values():
        assert min(chip.memory, chip.tflops, chip.bandwidth, chip.link) > 0 and chip.source
        assert bool(chip.config) == (chip.platform == "cuda")
        # The description of a GPU and its rates must be of the same chip.
        assert f"device_memory_size: {chip.memory}\n" in chip.config or chip.platform == "tpu"


def test_kernels_are_counted_outside_fusions():
    text = """HloModule m

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %c = f32[4]{0} copy(%p)
  ROOT %g = f32[4]{0} gather(%c, %c), slice_sizes={1}
}

ENTRY %main (x: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %f = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %s = f32[4]{0} scatter(%f, %x, %x), to_apply=%add
  ROOT %t = (f32[4]{0}, f32[4]{0}) tuple(%f, %s)
}
"""
    assert hlo.kernels(text) == 2


@pytest.mark.parametrize(
    "message, said",
    [
        ("RESOURCE_EXHAUSTED: ... Used 24.81G of 15.75G hbm. Exceeded", "24.81G of 15.75G"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (29.80G) exceeds available memory (15.75G)",
            "29.80G of 15.75G",
        ),
    ],
)
def test_a_refusal_gives_the_needed_and_the_available_memory(message, said):
    assert targets.how_much(message) == said


# A TPU stores a kernel by rows if the classes are a multiple of 128, and most others by columns.
@aot
@pytest.mark.parametrize(
    "target, classes",
    [("v5e", 5_000_064), ("v5e", 5_000_000), ("v6e", 9_900_032)],
)
def test_one_chip_trains_nine_tenths_of_the_classes_that_its_memory_holds(target, classes):
    on, shape = targets.target(target), Shape(4096, 512, classes)
    state = (2 + 4) * shape.dim * classes
    assert state > 0.9 * on.chip.memory
    (arm,) = (arm for arm in arms.arms(shape) if arm.name == arms.FUSED_SGD)
    lowered = compiled.lower_arm(on, arm, shape, "bf16")
    facts = hlo.facts(lowered.compile(), shape.dim * classes)
    assert facts.temporary_bytes < 64e6
    assert facts.reused_bytes == state and facts.large_moves == {}


@aot
def test_plain_softmax_of_a_million_classes_does_not_fit_where_class_blocks_do():
    size = "(4096, 512, 1000000) bf16"
    plain = program("v5e", arms.PLAIN, size)
    assert not plain["fits"] and plain["refused"].endswith("of 15.75G")
    blocks = program("v5e", arms.RECOMPUTED, size)
    assert blocks["fits"] and blocks["temporary_bytes"] < 64e6 and blocks["large_moves"] == {}


@aot
# A v6e's compiler also stores the logits' gradient, in bfloat16.
@pytest.mark.parametrize(("target", "bytes_of_a_logit"), [("v5e", 4), ("v6e", 6)])
def test_the_one_shot_keeps_one_array_of_logits(target, bytes_of_a_logit):
    shape = Shape(512, 256, 102400)
    found = program(target, arms.ONE_SHOT, f"{shape} bf16")
    assert found["temporary_bytes"] < 1.05 * bytes_of_a_logit * shape.batch * shape.classes
    assert found["large_moves"] == {} and not found["float64"]


@aot
@pytest.mark.parametrize("target", ["v5e", "v6e"])
@pytest.mark.parametrize(
    "classes, context, full", [(10, None, 3), (1000, None, 0), (1000, "highest", 3)]
)
def test_which_products_a_tpu_computes_at_full_precision(target, classes, context, full):
    on = targets.target(target)
    shape = Shape(256, 256, classes)
    one_shot = next(arm for arm in arms.arms(shape) if arm.name == arms.ONE_SHOT)
    with jax.default_matmul_precision(context):
        text = on.compile(compiled.lower_arm(on, one_shot, shape, "f32")).as_text()
    products = [line for line in text.splitlines() if " convolution(" in line]
    assert len(products) == 3
    assert sum("operand_precision={highest,highest}" in line for line in products) == full


def sharded(on, shape, dtype, name, mesh):
    """The case of an arm whose classes are split over a mesh."""
    cases = compiled.slice_head_cases(on, [(shape, dtype)])
    (found,) = (c for c in cases if c.name == f"class-parallel {name}" and c.size.endswith(mesh))
    return found


@aot
def test_1e8_classes_on_256_chips_fit_and_gather_no_logits():
    shape, on = Shape(8192, 512, 10**8), targets.target("v5e:16x16")
    case = sharded(on, shape, "bf16", arms.RECOMPUTED, "16 x 16")
    program = case.lower().compile()
    facts = hlo.facts(program, case.elements)
    assert facts.argument_bytes < 6.5e9 and facts.temporary_bytes < 64e6
    found = hlo.collectives(program, 256)
    assert len(found) <= 5
    # The kernel's gradient is summed over data; no array of rows by classes is sent.
    rows, columns = shape.batch // 16, shape.classes // 16
    others = [c for c in found if c.size < case.elements]
    assert len(others) == len(found) - 1
    assert max(c.size for c in others) < rows * columns / 64
    assert "f64[" not in program.as_text()


@pytest.mark.parametrize("name", [arms.RECOMPUTED, arms.FUSED_SGD])
def test_arms_over_a_mesh_send_little_and_update_in_place(name):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    on = targets.Target("here:2x4", targets.CHIPS["v5e"], jax.devices()[:8])
    case = sharded(on, Shape(64, 16, 40_003), "f32", name, "2 x 4")
    assert case.elements == 16 * 40_004 // 4 and case.flops == 2 * 32 * 4 * case.elements
    row = compiled.compiled_row(on, case)
    summed = [c for c in row["collectives"] if c["size"] >= 4 * case.elements]
    if name == arms.FUSED_SGD:
        assert row["reused_bytes"] == (4 + 4) * case.elements
        assert summed == []  # the kernel's gradient never exists whole
    else:
        assert len(row["collectives"]) <= 5 and [c["kind"] for c in summed] == ["all-reduce"]
    assert row["least_milliseconds"] > 0 and row["fits"]


@pytest.mark.parametrize("lower", [notebooks.lower_tour, notebooks.lower_devices])
def test_the_notebooks_steps_are_compiled_and_nothing_runs(lower, capsys):
    here = targets.Target("here", targets.CHIPS["v5e"], jax.devices("cpu")[:1])
    step = lower(here)
    assert [leaf.shape for leaf in jax.tree.leaves(step.in_avals)][-2:] == [(64, 64), (64,)]
    facts = hlo.facts(step.compile(), sys.maxsize)
    # Both notebooks have a first layer of 64 x 128 numbers, and further layers.
    assert facts.argument_bytes > 4 * 64 * 128 and capsys.readouterr().out == ""


def compile_two(monkeypatch, folder, commit="a" * 40, versions=None, only=""):
    """Compiles a part with programs `one` and `two`; returns the compiled names and the result."""
    done = []

    def row(on, case):
        done.append(case.name)
        return {"name": case.name, "size": "s", "devices": 1, "fits": False, "refused": "2G of 1G"}

    facts = {"commit": commit, "versions": versions or {"jax": "1"}, "device": "cpu"}
    monkeypatch.setattr(compiled, "compiled_row", row)
    monkeypatch.setattr(records, "provenance", lambda devices: facts)
    monkeypatch.setattr(sys, "argv", ["experiments", "compile"])
    cases = [compiled.Case(name, "s", lambda: None) for name in ("one", "two")]
    on = targets.Target("v5e:2x4", targets.CHIPS["v5e"], [None] * 8)
    compiled.compile_part(compiled.Part(on, "v5e", "heads", cases), only, folder)
    return done, json.loads((folder / "v5e-heads.json").read_text())


def test_a_result_has_its_versions(tmp_path, monkeypatch):
    _, saved = compile_two(monkeypatch, tmp_path)
    assert saved["versions"] == {"jax": "1"} and saved["chip"]["source"]
    assert saved["target"] == "v5e" and saved["device"] == "none: compiled, not run"
    assert [row["commit"] for row in saved["programs"]] == ["a" * 40] * 2


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    assert compile_two(monkeypatch, tmp_path, only="two")[0] == ["two"]
    done, saved = compile_two(monkeypatch, tmp_path)
    assert done == ["one"] and [row["name"] for row in saved["programs"]] == ["one", "two"]
    assert compile_two(monkeypatch, tmp_path)[0] == []


def test_another_commit_or_version_compiles_again(tmp_path, monkeypatch):
    compile_two(monkeypatch, tmp_path)
    # A program that is not asked for keeps its row.
    done, saved = compile_two(monkeypatch, tmp_path, commit="b" * 40, only="one")
    assert done == ["one"] and [row["commit"][0] for row in saved["programs"]] == ["b", "a"]
    assert compile_two(monkeypatch, tmp_path, versions={"jax": "2"})[0] == ["one", "two"]
    changed = "b" * 40 + "-changed"
    for _ in range(2):
        assert compile_two(monkeypatch, tmp_path, commit=changed)[0] == ["one", "two"]


@aot
def test_a_program_that_is_not_there_is_named(capsys):
    assert main(["compile", "--targets", "v5e:2x4", "--only", "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err


@aot
def test_a_slice_steps_over_all_chips_by_jit_and_by_pmap(monkeypatch):
    # The digits' network has the same programs and compiles in seconds.
    monkeypatch.setitem(compiled.CONFIGS, "mnist-m4", compiled.CONFIGS["digits-m4"])
    on = targets.target("v5e:2x2")
    rows = [compiled.compiled_row(on, case) for case in compiled.slice_step_cases(on)]
    by_jit, by_pmap, sharded = rows
    assert by_jit["name"] == "data-parallel step" and by_pmap["name"] == "pmap's step"
    for row in by_jit, by_pmap:
        assert {(c["kind"], c["devices"]) for c in row["collectives"]} == {("all-reduce", 4)}
    # The classes are split over pairs of chips, which gather a few numbers of each row.
    assert {c["kind"] for c in sharded["collectives"]} == {"all-reduce", "all-gather"}
    assert all(row["fits"] and not row["float64"] for row in rows)


def committed(name):
    return json.loads((CLONE / "experiments/results/compiled" / f"{name}.json").read_text())


@pytest.mark.parametrize("chip, words", [("v5e", "v5e"), ("h100", "H100")])
def test_the_readme_has_the_largest_heads_of_the_committed_results(chip, words):
    (row,) = committed(f"{chip}-largest")["largest"]
    plain, ours = (f"{row[way] / 1e6:.3g} million" for way in ("plain", "ours"))
    for page in (README, GUIDE):
        text = " ".join(page.split())
        assert words in text and ours in text and plain.removesuffix(" million") in text


@pytest.mark.parametrize("size", ["(256, 256, 10) f32", "(512, 512, 10575) bf16"])
def test_the_guide_has_the_kernels_of_the_committed_results(size):
    rows = {row["name"]: row for row in committed("h100-heads")["programs"] if row["size"] == size}
    plain, ours = (rows[name]["kernels"] for name in (arms.PLAIN, arms.ONE_SHOT))
    shape = size.rpartition(" ")[0]
    aims = [line for line in GUIDE.splitlines() if line.startswith("| at most")]
    (line,) = (line for line in aims if shape in line)
    assert f" has {plain} | {ours} |" in line


def test_the_guide_has_the_steps_of_the_committed_results():
    programs = committed("h100-steps")["programs"]
    rows = {row["size"]: row for row in programs if row["name"] == "training step"}
    for network in compiled.NETWORKS:
        for dtype, words in (("f32", "float32"), ("bf16", "bfloat16")):
            both = (rows[f"{network}-{kind}, batch 256, {dtype}"] for kind in ("softmax", "m4"))
            cells = (f"{r['temporary_bytes'] / 1e6:,.0f} MB, {r['kernels']}" for r in both)
            assert f"| {words} | {' | '.join(cells)} |" in GUIDE, network


@pytest.mark.parametrize("most", [0, 1, 37, 100])
def test_the_largest_head_is_bisected(most):
    tried = []

    def fits(classes):
        tried.append(classes)
        return classes <= most * 1000

    assert largest.bisected(fits, 100_000) == most * 1000
    assert len(tried) <= 7


def test_a_stopped_search_for_the_largest_head_goes_on(tmp_path, monkeypatch):
    chip = targets.Chip("tpu", 3072 * 10_000, 1, 1, 1, "a test")
    on, file, tried = targets.Target("v5e:1x2", chip, [None] * 2), tmp_path / "f", []
    facts = {"commit": "a" * 40, "versions": {"jax": "1"}}

    def refused(on, shape, model, way):
        if len(tried) == 15:
            raise KeyboardInterrupt
        tried.append(shape)
        most = (2_500 if way == "plain" else 9_950) * model
        return f"{shape.classes} of {most}" if shape.classes > most else None

    monkeypatch.setattr(largest, "refused", refused)
    monkeypatch.setattr(records, "provenance", lambda devices: facts)
    with pytest.raises(KeyboardInterrupt):
        largest.search(on, file)
    saved = json.loads(file.read_text())
    assert len(saved["tried"]) == 15 and saved["target"] == "v5e:1x2"
    before, tried[:] = list(tried), []
    rows = largest.search(on, file)
    assert rows == [
        {"data": 1, "model": 1, "bound": 10_000, "plain": 2_500, "ours": 9_900},
        {"data": 1, "model": 2, "bound": 20_000, "plain": None, "ours": 19_800},
    ]
    assert largest.table(rows).row_count == 2
    # At most seven sizes of each kind are tried, and none twice.
    assert 15 < len(before + tried) <= 21
    assert json.loads(file.read_text())["largest"] == rows
    facts["commit"] = "b" * 40
    tried[:] = []
    with pytest.raises(KeyboardInterrupt):
        largest.search(on, file)


def test_the_size_of_a_head_is_compared_with_the_chips_memory():
    small = targets.CHIPS["v5e"]._replace(memory=10**9)
    on = targets.Target("here", small, jax.devices("cpu")[:1])
    assert largest.refused(on, Shape(8, 512, 10_000), 1, "ours") is None
    assert largest.refused(on, Shape(8, 512, 400_000), 1, "ours").endswith(" of 1 GB")


@aot
def test_own_heads_stand_beside_what_a_slices_compiler_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    own = ["compile", "--targets", "v5e:2x4", "--shapes", "1024", "512", "100000"]
    assert main([*own, "--only", arms.FUSED_SGD, "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "class-parallel lsoftmax_sgd" in printed and "(1024, 512, 100000) bf16, 1 x 8" in printed


def test_own_heads_need_at_least_one_class(capsys):
    assert main(["compile", "--shapes", "8", "8", "0"]) == 2
    assert "shapes must be at least 1" in capsys.readouterr().err
