import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.hierarchy import model as hierarchy_model
from joma.hierarchy import run
from launch.bench import joma
from launch.bench import torch_peer
from scansnap_jax.experiment import errors

# Sums over 16 features and 5 positions in float32, in two orders.
_ATOL = 1e-5
_FAST_COMPILE = {"xla_backend_optimization_level": "0"}


class TorchTest(absltest.TestCase):

  def test_loss_and_gradients_equal_those_of_the_jax_model(self):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed.")
    model = hierarchy_model.HierarchyTransformer(
        12, 4, num_layers=2, embed_dim=16, hidden_dim=8
    )
    tokens = np.random.default_rng(0).integers(12, size=(4, 5))
    init = jax.jit(model.init, compiler_options=_FAST_COMPILE)
    params = init(jax.random.key(0), jnp.asarray(tokens))
    params = params["params"]
    loss_of = lambda params: run.weighted_loss(
        *(params, model, jnp.asarray(tokens), jnp.arange(4)),
        *(jnp.full(4, 1 / 4), 3),
        last_only=False,
    )
    expected, grads = jax.jit(
        jax.value_and_grad(loss_of), compiler_options=_FAST_COMPILE
    )(params)
    for last_only in (False, True):
      own = torch_peer.trainable(params)
      loss = torch.nn.functional.cross_entropy(
          joma.torch_logits(own, torch.tensor(tokens), 3, last_only),
          torch.arange(4),
      )
      loss.backward()
      np.testing.assert_allclose(loss.item(), expected, atol=_ATOL)
      jax.tree.map(
          lambda tensor, grad: np.testing.assert_allclose(
              tensor.grad, grad, atol=_ATOL
          ),
          *(own, grads),
      )

  def test_absence_is_told_before_anything_is_measured(self):
    with mock.patch("importlib.util.find_spec", return_value=None):
      with self.assertRaisesRegex(errors.UserError, r"scansnap-jax\[bench\]"):
        joma.measure(joma.BenchConfig())


@pytest.mark.slow
class ScriptTest(absltest.TestCase):

  def test_writes_what_it_measures_and_every_row_has_the_same_loss(self):
    output = pathlib.Path(self.create_tempdir().full_path, "bench.json")
    torch = importlib.util.find_spec("torch")
    subprocess.run(
        [
            *(sys.executable, "-m", "launch.bench.joma", f"--output={output}"),
            *("--embed_dims=8", "--set_sizes=2", "--num_classes=5"),
            *("--num_layers=2", "--seq_len=10", "--batch_size=4"),
            *("--num_rounds=2", "--num_steps=1"),
            *(() if torch else ("--notorch",)),
        ],
        cwd=pathlib.Path(joma.__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    table = json.loads(output.read_text())["d=8, sets of 2"]
    self.assertLen(table, 7 if torch else 5)
    losses = [row["loss"] for row in table]
    np.testing.assert_allclose(losses, losses[0], atol=_ATOL)


if __name__ == "__main__":
  absltest.main()
