import json
import os
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.aot import topology
from kernels_pallas.attention.ring import api as ring_api
from kernels_pallas.attention.ring import order
from tests.kernels_pallas.attention.ring import on_eight


def _normal(*shape):
  draw = np.random.default_rng(sum(shape)).normal(size=shape)
  return jnp.asarray(draw, jnp.float32)


class EightDevicesTest(parameterized.TestCase):

  def _check(self, names):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    module = "tests.kernels_pallas.attention.ring.on_eight"
    done = subprocess.run(
        [sys.executable, "-m", module, *names],
        env=environment,
        capture_output=True,
        text=True,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    self.assertLen(rows, len(names))
    for row in rows:
      self.assertLess(row["error"], 1, row["case"])

  def test_a_ragged_causal_text_is_that_of_one_device(self):
    self._check(["ragged"])

  @pytest.mark.slow
  def test_values_gradients_and_column_sums_are_those_of_one_device(self):
    self._check(list(on_eight.CASES))


class RefusalTest(absltest.TestCase):

  def _refuses(self, message, length=4, **options):
    ring = order.Ring(axis="seq", num_devices=2, is_balanced=True, num_steps=2)
    x = _normal(1, length, 2, 8)
    with self.assertRaisesRegex(ValueError, message):
      ring_api.attention(x, x, x, ring=ring, **options)

  def test_what_a_ring_cannot_do_is_said(self):
    self._refuses("has 3 queries; .* a multiple of 4 positions", length=3)
    self._refuses("'reference' knows no ring", implementation="reference")
    table = jnp.zeros((1, 1, 1, 1), jnp.int32)
    blocks = selection.Selection(table, table[..., 0], None, 4, 4)
    self._refuses("Selection; on a ring it must be", where=blocks)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class TpuTest(absltest.TestCase):

  def _program(self, function):
    """Scheduled HLO of a causal text of 8,192 positions on eight chips."""
    _, devices = topology.named_devices("v5e:2x4")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.Mesh(np.array(devices), ("seq",), axis_types=auto)
    where = masks.causal(8192)
    ring = order.plan(where, 8192, 8192, "seq", 8)
    text = jax.P(None, "seq")
    place = jax.NamedSharding(mesh, text)
    array = lambda heads: jax.ShapeDtypeStruct(
        (1, 8192, heads, 128), jnp.bfloat16, sharding=place
    )

    def own(query, key, value, mask):
      op = lambda *arrays: ring_api.attention(*arrays, ring=ring, where=mask)
      return function(op, query, key, value)

    def whole(query, key, value):
      spans = jax.tree.map(lambda _: text, where)
      out = text if function is _out else (text,) * 3
      return jax.shard_map(
          own, in_specs=(text,) * 3 + (spans,), out_specs=out, check_vma=False
      )(query, key, value, jax.tree.map(jnp.asarray, where))

    with jax.set_mesh(mesh):
      lowered = jax.jit(whole).lower(array(8), array(2), array(2))
      return lowered.compile().as_text()

  def test_keys_are_on_their_way_while_a_kernel_runs(self):
    self.assertGreater(_overlapped(self._program(_out)), 0)

  @pytest.mark.slow
  def test_so_are_gradients(self):
    self.assertGreater(_overlapped(self._program(_gradients)), 1)


def _out(op, *arrays):
  return op(*arrays).out


def _gradients(op, *arrays):
  out, back = jax.vjp(lambda *arrays: op(*arrays).out, *arrays)
  return back(out)


def _overlapped(program):
  """Kernels between the start and the end of an exchange, in schedules."""
  found = 0
  for body in re.split(r"\n(?=%|ENTRY)", program):
    under_way = 0
    for line in body.splitlines():
      under_way += bool(re.search(r" collective-permute-start\(", line))
      under_way -= bool(re.search(r" collective-permute-done\(", line))
      found += under_way > 0 and "tpu_custom_call" in line
  return found


if __name__ == "__main__":
  absltest.main()
