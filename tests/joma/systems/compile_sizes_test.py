"""Every system's training and decode step at one size, for TPUs not there.

B = 2 texts of T = 2048 tokens, N = 8 heads of H = 128, K = 2 key heads.
"""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer import model as models
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import hlo
from kernels_pallas.aot import topology

_NAMES = tuple(sorted(names.SYSTEMS))
_LENGTH = 2048
# Each with a program of its own: the rest repeats one of them, or softmax's.
_BUSIEST = (
    "act",
    "distance_bias",
    "hip",
    "key_bias",
    "lightning",
    "moba",
    "pointwise",
    "positional",
    "self_gating",
    "xattention",
)


def _model(entry):
  return configs.TransformerConfig(
      vocab_size=256,
      num_layers=1,
      embed_dim=256,
      num_heads=8,
      num_kv_heads=2,
      head_dim=128,
      hidden_dim=256,
      max_len=2 * _LENGTH,
      attention=(entry,),
  )


def _params(config):
  model = models.Transformer(config, implementation="reference")
  token = jnp.zeros((2, 1), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), token)["params"]


def _train(entry, chip, length=_LENGTH):
  """Forward and backward."""
  config = _model(entry)
  model = models.Transformer(config, jnp.bfloat16)

  def loss(params, tokens):
    logits = model.apply({"params": params}, tokens)
    return jnp.square(logits.astype(jnp.float32)).mean()

  text = jax.ShapeDtypeStruct((2, length), jnp.int32)
  step = jax.value_and_grad(loss)
  return compile_lib.compile_for(chip, step, _params(config), text)


def _decode(entry, chip, length=_LENGTH):
  config = _model(entry)
  model = models.Transformer(config, jnp.bfloat16)
  one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  caches = jax.eval_shape(
      lambda: full_cache.init(config, 2, length, jnp.bfloat16)
  )
  step = jax.jit(
      lambda params, tokens, positions, caches: model.apply(
          {"params": params}, tokens, positions=positions, kv_cache=caches
      ),
      donate_argnums=3,
  )
  return compile_lib.compile_for(chip, step, _params(config), one, one, caches)


def _selectors():
  """Those that choose keys for attention, or in a mixer of their own."""
  made = {name: layer_hooks.of_layer(_model(name), 0).select for name in _NAMES}
  found = [name for name, one in made.items() if isinstance(one, hooks.Select)]
  return [*found, "moh_blocks", "nsa", "superlinear"]


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileSizesTest(parameterized.TestCase):

  @parameterized.product(entry=_NAMES, chip=("v5e", "v6e"))
  @pytest.mark.slow
  def test_both_steps(self, entry, chip):
    self._check(entry, chip)

  @parameterized.product(entry=_BUSIEST, chip=("v4", "v5p", "v7x"))
  @pytest.mark.slow
  def test_the_busiest_on_other_chips(self, entry, chip):
    self._check(entry, chip)

  def _check(self, entry, chip):
    _train(entry, chip)
    compiled = _decode(entry, chip)
    config = _model(entry)
    caches = jax.eval_shape(
        lambda: full_cache.init(config, 2, _LENGTH, jnp.bfloat16)
    )
    # What is kept is written in place; a step has no second copy of it.
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    self.assertGreaterEqual(compiled.alias_bytes, held)
    # Weights in bfloat16 are the other thing there is: v5p has these in HBM,
    # as 1,513,792 bytes of lightning's step, whose state of 1,048,576 is in
    # VMEM; others have both in VMEM, uncounted.
    weights = [2 * x.size for x in jax.tree.leaves(_params(config))]
    self.assertEmpty(hlo.copies(compiled.hlo, max(weights) + 1))
    self.assertLess(compiled.temp_bytes, max(held, sum(weights), 2**16))

  @parameterized.product(
      entry=("hip", "indexer", "landmark:k=4", "moba", "nsa", "superlinear"),
      chip=("v5e", "v5p"),
  )
  @pytest.mark.slow
  def test_a_step_that_reads_few_keys_of_many_copies_none(self, entry, chip):
    """Of 65,536 tokens, whose keys alone are 67 MB."""
    compiled = _decode(entry, chip, 2**16)
    self.assertEmpty(hlo.copies(compiled.hlo, 2**22))
    self.assertLess(compiled.temp_bytes, 2**23)

  @parameterized.parameters(*_selectors())
  @pytest.mark.slow
  def test_a_selector_trains_without_an_array_of_t_by_t(self, entry):
    # By default it reads all keys of such texts, and chooses nothing.
    entry = "indexer:k=256" if entry == "indexer" else entry
    short, long = (
        hlo.largest_array(_train(entry, "v5e", length).hlo)
        for length in (_LENGTH // 2, _LENGTH)
    )
    # Temporary bytes say nothing: XLA puts into VMEM, uncounted, what fits.
    self.assertLess(long, 2.1 * short)


if __name__ == "__main__":
  absltest.main()
