"""HyLRA: what a layer hands on, and what those behind it read."""

import functools

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.systems.reuse import heaviest
from joma.systems.reuse import hylra
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

_SIZE, _NUM, _LENGTH = 2, 3, 14


@functools.cache
def _model(entry):
  config = configs.TransformerConfig(
      vocab_size=11,
      num_layers=3,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=8,
      embed_scale=4.0,
      attention=(entry,) if entry else (),
  )
  return models.Transformer(config, implementation="reference")


@functools.cache
def _drawn():
  tokens = jax.random.randint(jax.random.key(1), (2, _LENGTH), 0, 11)
  params = applied.params(_model(""))
  return params, tokens


@functools.cache
def _seen(entry):
  """What the layers of a model sow."""
  params, tokens = _drawn()
  run = jax.jit(
      lambda: _model(entry).apply(
          {"params": params}, tokens, mutable="intermediates"
      )[1]["intermediates"],
      compiler_options={"xla_backend_optimization_level": "0"},
  )
  return jax.device_get(run())


def _best(weights, t):
  """Blocks of one query by a plain loop: first, own, and the heaviest."""
  own = t // _SIZE
  mass = [weights[c * _SIZE : (c + 1) * _SIZE].sum() for c in range(own + 1)]
  others = sorted(range(1, own), key=lambda c: -mass[c])
  return {0, own, *others[: _NUM - len({0, own})]}


class HylraTest(absltest.TestCase):

  @pytest.mark.slow
  def test_layers_read_what_the_last_full_one_attended_to_most(self):
    """The twin is a layer's own choice, which is another."""
    seen, differs = _seen("hylra:full=0:k=6:block=2"), 0
    weights = [seen[f"layers_{l}"]["attn"]["attn_weights"][0] for l in range(3)]
    plain = _seen("")["layers_1"]["attn"]["attn_weights"][0]
    for b, n, t in np.ndindex(2, 4, _LENGTH):
      group = (b, slice(n // 2 * 2, n // 2 * 2 + 2), t)
      want = _best(weights[0][group].sum(axis=0), t)
      for layer in (1, 2):
        read = np.flatnonzero(weights[layer][b, n, t]) // _SIZE
        self.assertEqual(set(read.tolist()), want)
      differs += _best(plain[group].sum(axis=0), t) != want
    self.assertGreater(differs, 10)

  @pytest.mark.slow
  def test_with_all_keys_it_is_dense_and_the_layers_before_to_the_bit(self):
    few, many = _seen("hylra:full=0.1:k=6:block=2"), _seen("hylra:full=0.1")
    plain = _seen("")
    for layer in (0, 1):
      for found in (few, many):
        np.testing.assert_array_equal(
            found[f"layers_{layer}"]["resid_mlp"][0],
            plain[f"layers_{layer}"]["resid_mlp"][0],
        )
    last = lambda seen: seen["layers_2"]["resid_mlp"][0]
    np.testing.assert_allclose(last(many), last(plain), atol=1e-6)
    self.assertGreater(np.abs(last(few) - last(plain)).max(), 1e-3)

  def test_a_choice_has_the_first_and_the_own_block_and_the_heaviest(self):
    rng = np.random.default_rng(0)
    weights = np.float32(rng.uniform(size=(1, 4, _LENGTH, _LENGTH)))
    weights *= np.tri(_LENGTH)
    mass = heaviest.block_mass(jnp.asarray(weights), 2, _SIZE)
    own = jnp.arange(_LENGTH)[None, None] // _SIZE
    blocks, is_valid = map(np.asarray, heaviest.top(mass, own, _NUM))
    for head, t in np.ndindex(2, _LENGTH):
      found = blocks[0, head, t][is_valid[0, head, t]].tolist()
      self.assertLen(set(found), len(found))
      of_group = weights[0, 2 * head : 2 * head + 2, t].sum(axis=0)
      self.assertEqual(set(found), _best(of_group, t))

  @pytest.mark.slow
  def test_overlaps_are_measured_under_the_plan(self):
    """With its own choice a layer shares everything, with another's less."""
    overlap = lambda entry: _seen(entry)["layers_1"]["attn"]["hylra_overlap"][0]
    self.assertEqual(overlap("hylra:full=0:k=6:block=2:reuse=false").min(), 1)
    shared = overlap("hylra:full=0:k=6:block=2")
    self.assertEqual(shared[:, : 2 * _SIZE].min(), 1)  # All there are.
    self.assertLess(shared.mean(), 0.95)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "first layer, 0"):
      hylra.Hylra(full="1.2")
    with self.assertRaisesRegex(errors.UserError, "full='0,1' must be"):
      hylra.Hylra(full="0,1")
    with self.assertRaisesRegex(errors.UserError, "multiple of block=16"):
      hylra.Hylra(k=16)


if __name__ == "__main__":
  absltest.main()
