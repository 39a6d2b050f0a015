"""What systems cost, against what they make and what XLA counts."""

import dataclasses
import datetime
import functools
import random

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from joma.inference.cost import cache_plan
from joma.inference.cost import cost_model
from joma.inference.cost import cost_table
from joma.inference.cost import cost_table_config
from joma.inference.cost import model_size
from joma.inference.cost import system_costs
from joma.inference.cost import traced
from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models

# Options with which the length below is enough to choose among.
_SMALL = {
    "echo_att": "echo_att:first=0:last=0",
    "hip": "hip:k=16:block=8:sinks=1:window=1",
    "hylra": "hylra:full=0:k=16:block=8",
    "landmark": "landmark:block=16:k=2",
    "moba": "moba:block=16",
}
# Systems of layers that take from the one before.
_TWO_LAYERS = ("echo_att", "hylra")
_NAMES = tuple(sorted(names.SYSTEMS))
_LENGTH = 128
# Others each day.
_DRAWN = random.Random(str(datetime.date.today())).sample(_NAMES, 4)
_PLAIN = configs.TransformerConfig(
    vocab_size=48,
    num_layers=1,
    embed_dim=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    hidden_dim=40,
    max_len=_LENGTH,
)


def _config(*entries, **changes):
  if set(entries) & set(_TWO_LAYERS):
    changes |= {"num_layers": 2}
  entries = tuple(_SMALL.get(entry, entry) for entry in entries)
  return dataclasses.replace(_PLAIN, attention=entries, **changes)


def _model(config):
  return models.Transformer(config, implementation="reference")


@functools.cache
def _shapes(config):
  token = jnp.zeros((1, 1), jnp.int32)
  made = jax.eval_shape(_model(config).init, jax.random.key(0), token)
  caches = jax.eval_shape(lambda: full_cache.init(config, 1, _LENGTH))
  return made, caches


def _compiled_flops(config):
  """Of a decode step, XLA's count, what is no product included."""
  params, caches = _shapes(config)
  one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  step = jax.jit(
      lambda params, tokens, positions, caches: _model(config).apply(
          params, tokens, positions=positions, kv_cache=caches
      )
  )
  return step.lower(params, one, one, caches).compile().cost_analysis()["flops"]


def _load(length=_LENGTH):
  return cost_model.Load(
      batch_size=1,
      length=length,
      weight_dtype="float32",
      cache_dtype="float32",
  )


class SystemCostsTest(parameterized.TestCase):

  def _check_sizes(self, name):
    config = _config(name)
    params, caches = _shapes(config)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(model_size.count(config).total, count)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
    plan = cache_plan.full()
    self.assertEqual(cost_model.cache_bytes(config, _load(), plan), held)

  @parameterized.parameters(*_DRAWN)
  def test_parameters_and_caches_are_those_that_are_made(self, name):
    self._check_sizes(name)

  @parameterized.parameters(*_NAMES)
  @pytest.mark.slow
  def test_sizes_of_every_system(self, name):
    self._check_sizes(name)

  def _check_flops(self, name):
    """Products are most of XLA's FLOPs; exponentials and sums are the rest."""
    ours, xla = [], []
    own = _config(name)
    plain = dataclasses.replace(own, attention=())
    for config in (own, plain):
      cost = cost_model.decode(config, _load(), cache_plan.full())
      self.assertEqual(cost.unknown, ())
      ours.append(cost.flops)
      xla.append(_compiled_flops(config))
    self.assertBetween(xla[0], ours[0], 1.5 * ours[0])
    self.assertBetween(xla[1], ours[1], 1.2 * ours[1])

  def test_flops_of_a_step_are_those_that_are_compiled(self):
    self._check_flops("hip")

  @parameterized.parameters(*_NAMES)
  @pytest.mark.slow
  def test_flops_of_every_system(self, name):
    self._check_flops(name)

  def test_what_a_selector_reads_by_hand(self):
    """4 blocks of keys and values, all means; a key, value and sum written."""
    config = _config("moba")
    step = system_costs.of_step(config, _LENGTH, "float32")
    of_head = 4 * 16 * 2 * 16 + (_LENGTH // 16) * 16 + 2 * 16 + 16
    self.assertEqual(step.moved, 4 * 4 * of_head)
    longer = system_costs.of_step(config, 4 * _LENGTH, "float32")
    # The means alone grow.
    more = 3 * _LENGTH // 16 * 16
    self.assertEqual(longer.moved - step.moved, 4 * 4 * more)

  def test_pairs_of_a_prompt_are_those_that_are_chosen(self):
    config = _config("moba")
    found = system_costs.of_pass(config, 1024)
    # Four blocks of 16 keys for each query and head, and a product of each with
    # the mean of all 64 blocks, once a key head.
    chosen = 4 * 16 * 8 * 1024 * 4 * 16
    search = 2 * 16 * 4 * 1024 * 64
    self.assertEqual(found.flops, chosen + search)
    self.assertEqual(found.plain, frozenset())

  @pytest.mark.slow
  def test_rules_that_kernels_skip_nothing_of_cost_all_pairs(self):
    load = _load(64)
    cost = lambda *entries: (
        cost_model.prefill(_config(*entries), load, cache_plan.full()).flops
    )
    pairs = 4 * 8 * 16
    self.assertEqual(
        cost("pointwise") - cost(), pairs * (64 * 64 - 64 * 65 // 2)
    )
    self.assertEqual(cost("sink_logits"), cost())

  def test_a_policy_evicts_from_layers_without_a_cache_of_their_own(self):
    config = _config("ssa", "moba", num_layers=2)
    load, plan = _load(), cache_plan.scored(8)
    held = cost_model.cache_bytes(config, load, plan)
    moba = system_costs.of_cache(config, _LENGTH, "float32").held
    self.assertEqual(held, moba + 4 * 8 * (2 * 4 * 16 + 8))

  def test_what_no_result_needs_counts_nothing(self):
    def call(x):
      unused = x @ x
      del unused
      return jax.lax.cond(True, lambda x: x @ x[:, :2], lambda x: x[:, :2], x)

    found = traced.trace(call, (jax.ShapeDtypeStruct((4, 4), jnp.float32),))
    self.assertEqual(found.flops, 2 * 4 * 4 * 2)

  def test_what_is_not_known_is_said(self):
    def call(x, steps):
      return jax.lax.fori_loop(0, steps, lambda _, x: x @ x, x)

    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    with self.assertRaises(traced.Unknown):
      traced.trace(call, (square, jax.ShapeDtypeStruct((), jnp.int32)))
    known = traced.trace(lambda x: call(x, 3), (square,))
    self.assertEqual(known.flops, 3 * 2 * 4**3)
    config = cost_table_config.CostTableConfig(
        shape=_PLAIN, chips=("v5e",), lengths=(64,), batch_sizes=(1,),
        policies=(),
    )  # fmt: skip
    rows = cost_table.make(config)["rows"]
    self.assertEqual(rows[0]["decode"]["unknown"], [])
    rows[0]["decode"]["unknown"] = ["products of a step"]
    self.assertEqual(
        cost_table._left_out(rows),
        ["Not counted, and not nothing: products of a step."],
    )


if __name__ == "__main__":
  absltest.main()
