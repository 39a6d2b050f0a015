"""The indexer: what it chooses, by hand, and what teaches it to."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from joma.systems.selectors import indexer
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from scansnap_jax.experiment import errors
from tests import draws
from tests.joma.systems.selectors import selected

_LENGTH = 20


def _drawn(system):
  config = configs.TransformerConfig(embed_dim=8, head_dim=8)
  params = system.init_params(jax.random.key(0), config, 0)
  x = draws.normal(1, 2, _LENGTH, 8)
  return params, selected.call(_LENGTH, x=x)


def _scores(params, x, relu=lambda x: np.maximum(x, 0)):
  query, key, weight = (
      np.tensordot(x, np.asarray(params[name]), 1)
      for name in ("query", "key", "weight")
  )
  products = relu(np.einsum("tje,se->tjs", query, key))
  return np.einsum("tj,tjs->ts", weight, products)


class IndexerTest(absltest.TestCase):

  def test_the_keys_of_greatest_score_are_read(self):
    """The twin leaves the ReLU out, as some ports do."""
    system = indexer.Indexer(k=4)
    params, call = _drawn(system)
    query, key, _ = selected.draw(_LENGTH)
    found = jax.jit(
        lambda params, query, key: system.select(
            params, call, query, key, masks.causal(_LENGTH)
        )
    )(params, query, key)
    self.assertEqual(found.block_table.shape, (2, 1, _LENGTH, 4))
    scores = _scores(params, np.asarray(call.x[1]))
    twin = _scores(params, np.asarray(call.x[1]), relu=lambda x: x)
    differs = 0
    for t in range(_LENGTH):
      best = lambda scores, t=t: set(
          np.argsort(-scores[t, : t + 1])[:4].tolist()
      )
      self.assertEqual(set(selected.listed(found, 1, 0, t)), best(scores))
      differs += best(twin) != best(scores)
    self.assertGreater(differs, 5)

  @pytest.mark.slow
  def test_its_loss_teaches_it_what_attention_reads(self):
    """From chance to most of the mass, of attention that tokens decide."""
    system = indexer.Indexer(k=_LENGTH)
    params, call = _drawn(system)
    project = lambda seed: draws.normal(seed, 8, 1, 8)
    query, key = (
        jnp.einsum("BTD,DNH->BTNH", call.x, project(i)) for i in (2, 3)
    )
    made = lambda system: hooks.Made(
        query=query,
        key=key,
        value=key,
        where=system.select(params, call, query, key, masks.causal(_LENGTH)),
        head_out=query,
        options=call.options,
    )
    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, state):
      loss = lambda params: system.losses(params, call, made(system))["index"]
      value, grads = jax.value_and_grad(loss)(params)
      update, state = optimizer.update(grads, state)
      return optax.apply_updates(params, update), state, value

    logits = jnp.einsum("BTNH,BSNH->BTS", query, key) * 8**-0.5
    allowed = jnp.tril(jnp.ones((_LENGTH, _LENGTH), bool))[None]
    weights = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf))

    def kept(params):
      few = indexer.Indexer(k=4)
      found = few.select(params, call, query, key, masks.causal(_LENGTH))
      mass = jnp.take_along_axis(weights, found.block_table[:, 0], axis=-1)
      return float(mass[:, 8:].sum(axis=-1).mean())

    before, state, values = kept(params), optimizer.init(params), []
    for _ in range(150):
      params, state, value = step(params, state)
      values.append(float(value))
    self.assertLess(values[-1], 0.5 * values[0])
    self.assertGreater(kept(params), before + 0.2)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "multiple of block=3"):
      indexer.Indexer(k=4, block=3)


if __name__ == "__main__":
  absltest.main()
