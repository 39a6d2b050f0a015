"""What tests of selectors share: arrays, a call, attention by a selector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import interpret
from kernels_pallas import masks
from kernels_pallas.attention import api


def draw(length=23, num_heads=4, num_kv_heads=2, seed=0, head_dim=8):
  """Query, key and value of two sequences."""
  rng = np.random.default_rng(seed)
  return tuple(
      jnp.asarray(rng.normal(size=(2, length, n, head_dim)), jnp.float32)
      for n in (num_heads, num_kv_heads, num_kv_heads)
  )


def call(length, x=None, params=None, config=None, carry=None):
  """Of two sequences, without rotation."""
  return hooks.Call(
      config=configs.TransformerConfig() if config is None else config,
      layer=0,
      x=jnp.zeros((2, length, 1)) if x is None else x,
      positions=jnp.zeros((2, length), jnp.int32) + jnp.arange(length)[None],
      rotate=lambda x, positions: x,
      options=hooks.AttentionOptions(scale=8**-0.5),
      params={} if params is None else params,
      carry={} if carry is None else carry,
      is_training=False,
      has_cache=False,
  )


def select(system, query, key):
  """The blocks of whole texts; parameters, if any, are drawn."""
  length, params = query.shape[1], {}
  x = jax.random.normal(jax.random.key(1), (2, length, 8))
  if isinstance(system, hooks.Parametric):
    config = configs.TransformerConfig(embed_dim=8, head_dim=8)
    params = system.init_params(jax.random.key(0), config, 0)
  choose = jax.jit(
      lambda q, k: system.select(
          params, call(length, x=x), q, k, masks.causal(length)
      )
  )
  return choose(query, key)


def listed(where, b, head, row):
  """Blocks of one row of a selection."""
  number = int(where.num_valid[b, head, row])
  return np.asarray(where.block_table[b, head, row, :number]).tolist()


@functools.partial(
    jax.jit,
    static_argnames="implementation",
    compiler_options={"xla_backend_optimization_level": "0"},
)
def read(where, arrays, implementation):
  """Output of attention, and the gradients of a token's squares."""

  def loss(arrays):
    out = api.attention(*arrays, where=where, implementation=implementation).out
    return (out**2).sum(axis=(2, 3)).mean(), out

  (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
  return out, grads


def apart(system, implementation, arrays=None):
  """Largest differences from dense attention: of outputs, of gradients."""
  arrays = draw() if arrays is None else arrays
  where = select(system, *arrays[:2])
  dense = masks.causal(arrays[0].shape[1])
  with interpret.interpreted():
    got = read(where, arrays, implementation)
  want = read(dense, arrays, "reference")
  return jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, want)
