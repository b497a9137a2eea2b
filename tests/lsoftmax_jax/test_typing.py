"""A strict mypy checks the arguments of heads and losses in a user's script."""

import subprocess
import sys

import pytest

SCRIPT = """
import jax
import jax.numpy as jnp
from flax import nnx

import lsoftmax_jax as lsm
from lsoftmax_jax import linen
from lsoftmax_jax.nnx import LSoftmaxDense

head = LSoftmaxDense(8, 10, margin=4, rngs=nnx.Rngs(0))
features, labels = jnp.ones((2, 8)), jnp.array([3, 7])
loss: jax.Array = head.loss(features, labels)
loss = head.loss(features, labels, lam=3.0, label_smoothing=0.1, plan=lsm.Plan())
loss, seen = head.loss_and_statistics(features, labels, lsm.self_paced())
lam: jax.Array = seen.lam
total: jax.Array = lsm.lsoftmax_loss_sum(features, jnp.eye(8), labels, margin=4, lam=5.0)
"""
WRONG = {
    "head.loss(features, labels, lambd=3.0)": 'Unexpected keyword argument "lambd" for "loss"',
    "head.loss(features)": 'Missing positional argument "labels"',
    "head.loss(features, labels, plan=3)": 'Argument "plan"',
    "linen.LSoftmaxDense(10).loss(features, labels, lambd=3.0)": 'argument "lambd" for "loss"',
    "lsm.lsoftmax_loss(features, jnp.eye(8), labels, margin=4)": 'Missing named argument "lam"',
}


def test_mypy_sees_the_arguments_of_heads_and_losses(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\n".join(WRONG) + "\n")
    # pyproject.toml makes mypy strict; without other options mypy reuses the cache of `make lint`.
    command = [sys.executable, "-m", "mypy", "--no-color-output", str(script)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    first = SCRIPT.count("\n") + 1
    errors = [line for line in output.splitlines() if ": error: " in line]
    for line, (call, message) in enumerate(WRONG.items(), first):
        assert any(f":{line}: error: " in e and message in e for e in errors), (call, output)
    assert len(errors) == len(WRONG), output
