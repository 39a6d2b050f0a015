"""Heads that a block of queries has not chosen visit no tile."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import pytest

from joma.systems.routers import head_gates
from joma.systems.routers import moh_blocks
from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.attention import visits
from tests.joma.systems import one_layer

_BLOCK = 4


class MohBlocksTest(parameterized.TestCase):

  @parameterized.parameters("reference", "xla")
  @pytest.mark.slow
  def test_a_block_has_the_gates_of_its_first_token(self, implementation):
    config, params, x = one_layer.draw(f"moh_blocks:active=1:block={_BLOCK}")
    plain = one_layer.head_out(one_layer.CONFIG, params, x)
    got = one_layer.head_out(config, params, x, 0, implementation)
    gates = head_gates.gates_of(params["moh_blocks"], x, 1)
    first = np.arange(x.shape[1]) // _BLOCK * _BLOCK
    want = np.asarray(gates)[:, first][..., None] * plain
    np.testing.assert_allclose(got, want, atol=1e-5)
    self.assertGreater(np.abs(got - gates[..., None] * plain).max(), 0.1)

  @parameterized.parameters((1, 1), (2, 3), (0, 4))
  @pytest.mark.slow
  def test_tiles_visited_are_those_of_active_heads(self, shared, active):
    system = moh_blocks.MohBlocks(shared=shared, active=active, block=16)
    length, config = 100, dataclasses.replace(one_layer.CONFIG, num_heads=8)
    params = system.init_params(jax.random.key(0), config, 0)
    x = jax.random.normal(jax.random.key(1), (3, length, 16))
    gates = head_gates.gates_of(params, x[:, ::16], active)
    where = system.select(gates, masks.causal(length), length)
    count = lambda where: int(
        (
            visits.states_of(where, length, length, 16, 16) > selection.EMPTY
        ).sum()
    )
    every = 3 * 8 * count(masks.causal(length))
    self.assertEqual(every, 3 * 8 * 28)  # 7 blocks, each with those before it.
    self.assertEqual(8 * count(where), (shared + active) * every)


if __name__ == "__main__":
  absltest.main()
