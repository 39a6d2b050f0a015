import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import scansnap
from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import model
from scansnap_jax import run
from scansnap_jax import train
from scansnap_jax.experiment import errors

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
# Both add 127 tokens and 128 samples in float32; about a hundred roundings.
_ATOL = 1e-5


class MatmulFlopsTest(parameterized.TestCase):

  @parameterized.parameters(
      # M = 10 common + 2 x 10 distinct + 1 query + 2 next = 33; 160 runs of 100
      # steps of 3 products of 2 x 128 x 33 x 33 = 278,784 operations.
      ((1,), 16_000 * 3 * 278_784),
      # M = 33, 79, 125, 240, whose squares sum to 80,555.
      ((1, 3, 5, 10), 16_000 * 3 * 2 * 128 * 80_555),
  )
  def test_equals_hand_count(self, num_last, expected):
    config = config_lib.figure6()
    config = config_lib.ScanSnapConfig(
        data=config.data,
        num_last=num_last,
        lr_z=config.lr_z,
        lr_ratio=config.lr_ratio,
    )
    self.assertEqual(scansnap.matmul_flops(config), expected)


class TorchTest(absltest.TestCase):

  def test_loss_and_gradients_equal_those_of_the_jax_model(self):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed.")
    config = config_lib.figure6()
    classes = data.make_classes(config.data, 3)
    torch.manual_seed(0)
    context, query, label = scansnap.torch_batch(config, classes)
    params = {
        name: torch.randn(2 * [classes.num_tokens]).requires_grad_()
        for name in ("Y", "Z")
    }
    loss = scansnap.torch_loss(params, context, query, label)
    loss.backward()

    row = label.numpy() - classes.label[0]
    counts = np.take_along_axis(
        context.numpy().sum(axis=1), classes.support[row], axis=1
    )
    layer = model.make_layer(config.model, classes.num_tokens)
    batch = data.Batch(jnp.asarray(row), jnp.asarray(counts))
    shared = jax.tree.map(jnp.asarray, train.share(classes))
    expected, grads = jax.value_and_grad(run.mean_loss)(
        {name: jnp.asarray(p.detach().numpy()) for name, p in params.items()},
        *(layer, shared, batch),
    )
    np.testing.assert_allclose(loss.item(), expected, atol=_ATOL)
    for name, param in params.items():
      np.testing.assert_allclose(param.grad, grads[name], atol=_ATOL)

  def test_each_sequence_has_the_query_the_label_and_the_tokens_of_a_class(
      self,
  ):
    pytest.importorskip("torch", reason="PyTorch is not installed.")
    config = config_lib.figure6()
    classes = data.make_classes(config.data, 3)
    context, query, label = scansnap.torch_batch(config, classes)
    self.assertEqual(context.shape, (128, 127, classes.num_tokens))
    np.testing.assert_array_equal(context.sum(axis=2), 1)
    row = label.numpy() - classes.label[0]
    np.testing.assert_array_equal(query, classes.query[row])
    occurs = context.numpy().sum(axis=1) > 0
    self.assertFalse((occurs & (classes.probs[row] == 0)).any())

  def test_absence_is_told_before_anything_is_measured(self):
    with mock.patch("importlib.util.find_spec", return_value=None):
      with self.assertRaisesRegex(errors.UserError, r"scansnap-jax\[bench\]"):
        scansnap.measure(scansnap.BenchConfig())


class StopwatchTest(absltest.TestCase):

  def test_compiling_is_taken_from_the_piece_it_is_part_of(self):
    watch = scansnap.Stopwatch()
    compile_only = lambda: watch.hear(_COMPILE_EVENT, 1000.0)
    watch.timed("train", compile_only)()
    self.assertEqual(watch.seconds["compile"], 1000)
    # The call itself takes no time, so that the two cancel.
    self.assertAlmostEqual(watch.seconds["train"], -1000, delta=10)

  def test_traced_calls_are_no_piece(self):
    watch = scansnap.Stopwatch()
    double = watch.timed("train", lambda x: 2 * x)
    jax.eval_shape(double, jnp.ones(3))
    self.assertNotIn("train", watch.seconds)
    np.testing.assert_array_equal(double(jnp.ones(3)), 2)
    self.assertGreater(watch.seconds["train"], 0)
    self.assertGreater(watch.peak_rss_gb["train"], 0)


@pytest.mark.slow
class ScriptTest(absltest.TestCase):

  def test_writes_what_it_measures(self):
    output = pathlib.Path(self.create_tempdir().full_path, "bench.json")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "launch.bench.scansnap", "--notorch"),
            *("--num_seeds=2", "--num_steps=2", "--memory_num_last=2"),
            *("--seq_lens=16,32", "--length_steps=2", f"--output={output}"),
        ],
        cwd=pathlib.Path(scansnap.__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results = json.loads(output.read_text())
    self.assertEqual(list(results), ["machine", "sweep", "length", "memory"])
    for name in results:
      self.assertRegex(finished.stdout, rf"(?m)^{name}$")
    sweep = results["sweep"]
    self.assertEqual(sweep["num_runs"], 128)
    self.assertEqual(sweep["matmul_flops"], 2 * 128 * 3 * 2 * 128 * 80_555 // 4)
    for result in (sweep, results["memory"]):
      seconds = result["seconds"].values()
      self.assertAlmostEqual(sum(seconds), result["total_s"])
      self.assertGreaterEqual(min(seconds), 0)
      self.assertGreater(result["process_s"], result["total_s"])
      self.assertGreater(result["peak_rss_gb"], 0.1)
    self.assertEqual([row["T"] for row in results["length"]["steps"]], [16, 32])
    memory = results["memory"]
    self.assertEqual((memory["num_tokens"], memory["num_classes"]), (40, 4))
    self.assertLessEqual(memory["peak_rss_gb_unsaved"], memory["peak_rss_gb"])


if __name__ == "__main__":
  absltest.main()
