import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas.attention import visits
from kernels_pallas.attention.tpu import backward
from kernels_pallas.attention.tpu import backward_sums as sums_lib
from tests.kernels_pallas.attention.tpu import backward_cases as cases

# Ten times the error of float32 products of 400 terms, of values of size 1; and
# twice the rounding of one bfloat16 operand.
_ATOL = {jnp.float32: 4e-5, jnp.bfloat16: 2 * 2.0**-7}
_BLOCKS = {"block_q": 128, "block_kv": 128}


class BackwardTest(parameterized.TestCase):

  def _check(self, case, dtype=jnp.float32):
    with interpret.interpreted():
      found, expected = cases.both_gradients(case, dtype)
    for name, value in found.items():
      chex.assert_type(value, dtype)
      size = np.abs(expected[name]).max()
      np.testing.assert_allclose(
          np.asarray(value, np.float64),
          expected[name],
          rtol=0,
          atol=_ATOL[dtype] * size,
          err_msg=name,
      )
    return found

  @parameterized.named_parameters(
      (name, cases.CASES[name]) for name in cases.LEAD
  )
  def test_gradients_are_those_of_attention(self, case):
    self._check(case)

  @parameterized.named_parameters(
      item for item in cases.CASES.items() if item[0] not in cases.LEAD
  )
  @pytest.mark.slow
  def test_so_are_those_of_other_masks_and_parts(self, case):
    self._check(case)

  @pytest.mark.slow  # As api_test has it through the op.
  def test_bfloat16_gradients_are_those_of_rounded_inputs(self):
    self._check(cases.GROUP, jnp.bfloat16)

  @pytest.mark.slow
  def test_parts_of_bfloat16_are_added_in_float32(self):
    case = dataclasses.replace(cases.GROUP, block_kv=384)
    plan = cases.plan_of(case, jnp.bfloat16, heads=4, chunk=1)
    cut = dataclasses.replace(case, limit=sum(plan.vmem().values()))
    with interpret.interpreted():
      whole, _ = cases.both_gradients(case, jnp.bfloat16)
      parts, _ = cases.both_gradients(cut, jnp.bfloat16)
    # The same sums in another order, in float32: few roundings may differ.
    for name in whole:
      differs = np.asarray(whole[name] != parts[name])
      self.assertLess(differs.mean(), 1e-3, name)

  def test_halves_of_a_sum_are_all_of_its_bits(self):
    shape = (1, 2, 16, 128)
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values *= 2.0 ** np.random.default_rng(1).integers(-90, 90, shape)

    def kernel(values, whole, upper, lower):
      sums = sums_lib.Sums(None, None, lower, upper, lower, None)
      for i in range(2):
        sums_lib.store(sums, 0, i, values[0, i], False)
        whole[0, i] = sums_lib.load(sums, 0, i)

    with interpret.interpreted():
      found, *_ = pl.pallas_call(
          kernel,
          out_shape=(
              jax.ShapeDtypeStruct(shape, jnp.float32),
              jax.ShapeDtypeStruct(shape, jnp.bfloat16),
              jax.ShapeDtypeStruct((1, 2, 8, 128), jnp.int32),
          ),
          interpret=interpret.mode(),
      )(values)
    np.testing.assert_array_equal(found, values)

  @pytest.mark.slow  # As api_test has it through the op.
  def test_what_meets_nothing_has_gradient_0(self):
    # Queries 128.. see no key; keys 60.. are seen by none.
    stops = np.where(np.arange(256) < 128, 60, 0)[None].astype(np.int32)
    case = cases.Case(mask=masks.Mask(np.zeros_like(stops), stops))
    found = self._check(case)
    np.testing.assert_array_equal(found["query"][:, 128:], 0.0)
    np.testing.assert_array_equal(found["key"][:, 60:], 0.0)
    np.testing.assert_array_equal(found["value"][:, 60:], 0.0)
    for value in found.values():
      self.assertGreater(np.abs(value).max(), 0.1)

  @pytest.mark.slow
  def test_logits_of_ten_thousand_leave_no_nan(self):
    # Later keys have larger logits: exp of the forbidden ones overflows.
    case = cases.Case(mask=masks.causal(256), scale=1.0)
    arguments, _ = cases.arguments_of(case, jnp.float32)
    query, key, *rest = arguments
    ramp = jnp.linspace(-1e4, 1e4, 256).reshape(1, 1, 256, 1)
    query = jnp.zeros_like(query).at[..., :1].set(1.0)
    key = jnp.zeros_like(key).at[..., :1].set(ramp)
    # Causal, and 78 more a key: every query attends to its own key alone.
    rest[-3] = jnp.broadcast_to(ramp[..., 0], rest[-3].shape)
    rest[-2] = jnp.einsum("BNTH,BNTH->BNT", rest[-1], rest[0])
    with interpret.interpreted():
      d_query, d_key, d_value = backward.backward(
          query, key, *rest, scale=1.0, logits_soft_cap=None, **_BLOCKS
      )
    chex.assert_trees_all_close(d_value, rest[-1], atol=1e-5)
    for gradient in (d_query, d_key):
      # dP - delta = 0 but for the rounding of its 32 products.
      chex.assert_trees_all_close(
          gradient / 1e4, jnp.zeros_like(gradient), atol=1e-5
      )

  @pytest.mark.slow  # Traced masks of api_test make such lists.
  def test_lists_made_by_jax_are_lists_made_by_numpy(self):
    arguments, _ = cases.arguments_of(
        cases.CASES["chunks_of_2_of_3_tiles"], jnp.float32
    )
    call = functools.partial(
        backward.backward,
        scale=0.2,
        logits_soft_cap=None,
        vmem_limit_bytes=cases.CASES["chunks_of_2_of_3_tiles"].limit,
        num_cores=1,
        **_BLOCKS,
    )
    traced = jax.tree.map(jnp.asarray, arguments)
    with interpret.interpreted():
      chex.assert_trees_all_equal(call(*arguments), jax.jit(call)(*traced))

  def test_only_listed_tiles_are_visited(self):
    # A FULL tile that is not listed counts as forbidden.
    arguments, _ = cases.arguments_of(cases.Case(), jnp.float32)
    none = visits.by_key(np.zeros((1, 1, 2, 2), np.int8))
    arguments = (*arguments[:3], none, *arguments[4:])
    with interpret.interpreted():
      found = backward.backward(
          *arguments, scale=0.2, logits_soft_cap=None, **_BLOCKS
      )
    chex.assert_trees_all_equal(found, jax.tree.map(jnp.zeros_like, found))

  @pytest.mark.slow
  def test_memory_of_a_tpu_is_used_without_races(self):
    # 4 steps of each head, which has a core of its own; sums in 2 buffers.
    case = cases.Case(
        mask=masks.streaming(256, window=100, num_sinks=20), num_cores=2
    )
    case = cases.cut_of(case, heads=1, chunk=1)
    mode = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    try:
      with interpret.interpreted(mode):
        found, expected = cases.both_gradients(case)
        self.assertFalse(interpret_pallas_call.races.races_found)
    finally:
      pltpu.reset_tpu_interpret_mode_state()
    for name, value in found.items():
      np.testing.assert_allclose(value, expected[name], rtol=0, atol=4e-5)


if __name__ == "__main__":
  absltest.main()
