import functools
import inspect

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas.attention import api
from kernels_pallas.attention import differentiable
from kernels_pallas.attention.gpu import cudnn as cudnn_lib
from kernels_pallas.attention.gpu import entry

# Two hundred roundings of float32 numbers of order 1.
_ATOL = 2e-5

needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need jax >= 0.11"
)


class CudnnTest(parameterized.TestCase):
  """cuDNN itself runs on a GPU alone; here, what it would be told."""

  @parameterized.parameters(
      (None, {"is_causal": False, "window": None}),
      (masks.full(8, 8), {"is_causal": False, "window": None}),
      (masks.causal(8), {"is_causal": True, "window": None}),
      (masks.sliding_window(8, window=3), {"is_causal": True, "window": 3}),
  )
  def test_masks_that_it_has(self, mask, expected):
    assert self._options(mask) == expected

  @parameterized.parameters(
      (masks.sliding_window(8, window=3, is_causal=False), "causal window"),
      (masks.causal(8, offset=1), "causal window"),
      (masks.streaming(8, window=3, num_sinks=1), "one span"),
      (masks.hash_sparse(np.arange(8), np.arange(8)), "no ids"),
      (masks.document(np.array([0, 0, 0, 1, 1, 1, 1, 1])), "causal window"),
  )
  def test_masks_that_it_lacks(self, mask, reason):
    assert reason in self._options(mask)

  def test_it_is_never_replaced_silently(self):
    query = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    config = entry.Config(forward_by="cudnn")
    spec = differentiable.AttentionSpec(
        scale=1.0, logits_soft_cap=2.0, config=config
    )
    with pytest.raises(ValueError, match="cuDNN has no sink logits"):
      entry.forward(_inputs(query, query, query), spec)

  @needs_new_jax
  def test_it_is_told_all_and_gives_the_lse_of_the_column_sums(self):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    signature = inspect.signature(cudnn.dot_product_attention)
    mask = masks.sliding_window(96, window=40)
    rng = np.random.default_rng(4)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, 96, 1, 64)), jnp.bfloat16)
        for _ in range(3)
    )

    def stand_in(*args, **kwargs):
      told = signature.bind(*args, **kwargs).arguments
      assert told["mask_type"] == cudnn.MaskType.CAUSAL
      assert told["sliding_window_length"] == 40 and told["return_residual"]
      result = api.attention(
          *args,
          where=mask,
          scale=told["scale"],
          return_lse=True,
          implementation="reference",
      )
      return result.out, result.lse

    call = functools.partial(
        api.attention,
        query,
        key,
        value,
        where=mask,
        scale=0.3,
        return_lse=True,
        return_col_mass=True,
    )
    config = entry.Config(forward_by="cudnn")
    expected = call(implementation="reference")
    with pytest.MonkeyPatch.context() as patch, interpret.interpreted():
      patch.setattr(cudnn, "dot_product_attention", stand_in)
      found = call(implementation="pallas_gpu", config=config)
    np.testing.assert_array_equal(found.out, expected.out)
    np.testing.assert_array_equal(found.lse, expected.lse)
    np.testing.assert_allclose(found.col_mass, expected.col_mass, atol=_ATOL)

  def _options(self, mask):
    query = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    spec = differentiable.AttentionSpec(scale=1.0)
    return cudnn_lib.options_of(_inputs(query, query, query, mask), spec)


def _inputs(query, key, value, where=None):
  return differentiable.Inputs(query, key, value, where, None, None)
