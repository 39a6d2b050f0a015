"""One attention layer by itself, and what tests against torch models share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import full_cache
from kernels_pallas import masks
from tests import draws
from tests.joma.transformer import applied

CONFIG = configs.TransformerConfig(
    num_layers=1, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8
)
LENGTH = 9
_OPTIONS = {"xla_backend_optimization_level": "0"}


def _arguments(x):
  positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
  return x, positions, masks.causal(x.shape[1])


def draw(entry, config=CONFIG, layer=0, length=LENGTH):
  """A config with the entry, parameters of the layer, and an input."""
  config = dataclasses.replace(config, attention=(entry,) if entry else ())
  x = draws.normal(3, 2, length, config.embed_dim)
  module = attention.Attention(config, layer, implementation="reference")
  return config, applied.layer_params(config, layer, module, *_arguments(x)), x


def run(config, params, x, layer=0, implementation="reference", mask=None):
  """What the layer gives, and what it sows; a mask is known as it runs."""
  return _run(config, params, x, layer, implementation, mask)


@functools.partial(
    jax.jit,
    static_argnums=(0, 3, 4),
    compiler_options=_OPTIONS,
)
def _run(config, params, x, layer, implementation, mask):
  module = attention.Attention(config, layer, implementation=implementation)
  x, positions, whole = _arguments(x)
  (out, _, _), found = module.apply(
      {"params": params},
      x,
      positions,
      whole if mask is None else mask,
      mutable=["intermediates", "losses"],
  )
  sown = {**found.get("intermediates", {}), **found.get("losses", {})}
  return out, {name: values[0] for name, values in sown.items()}


def state_after(config, params, x, lengths, layer=0):
  """What prompts of such lengths, padded at their ends, leave in a mixer."""
  module = attention.Attention(config, layer, implementation="xla")
  steps = jnp.arange(x.shape[1])[None]
  positions = jnp.where(steps < jnp.asarray(lengths)[:, None], steps, -1)
  cache = full_cache.init(config, len(x), x.shape[1])[layer]
  mask = masks.causal(x.shape[1])
  # Traced anew each time: a test may have patched what is inside.
  run = jax.jit(
      lambda params, x, positions, cache: module.apply(
          {"params": params}, x, positions, mask, cache
      )[1],
      compiler_options=_OPTIONS,
  )
  cache = run(params, x, positions, cache)
  return np.asarray(cache.state)


def in_steps(config, params, x, length, layer=0):
  """What the layer gives for a prompt and then for single tokens."""
  module = attention.Attention(config, layer, implementation="reference")
  cache = full_cache.init(config, len(x), x.shape[1])[layer]
  run = jax.jit(
      lambda params, x, positions, cache: module.apply(
          {"params": params}, x, positions, masks.causal(x.shape[1]), cache
      )[:2],
      compiler_options=_OPTIONS,
  )
  outs, places = [], _arguments(x)[1]
  for start, stop in (
      (0, length),
      *((t, t + 1) for t in range(length, x.shape[1])),
  ):
    part = slice(start, stop)
    out, cache = run(params, x[:, part], places[:, part], cache)
    outs.append(out)
  return jnp.concatenate(outs, axis=1)


def head_out(config, params, x, layer=0, implementation="reference", mask=None):
  """The heads' outputs before the output projection."""
  seen = run(config, params, x, layer, implementation, mask)[1]
  return np.asarray(seen["head_out"])


def array(tensor):
  """A torch tensor as a jax array."""
  return jnp.asarray(tensor.detach().numpy())


def kernel(module, *shape):
  """A torch Linear's weight, inputs first."""
  weight = array(module.weight).T
  return {"kernel": weight.reshape(*shape) if shape else weight}


def causal(length):
  """What torch models add to logits, as NumPy."""
  seen = np.tri(length, dtype=bool)
  return np.where(seen, 0.0, -np.inf).astype(np.float32)[None, None]


def random_weights(peer, torch):
  """Weights that are not small."""
  torch.manual_seed(0)
  for weight in peer.parameters():
    torch.nn.init.normal_(weight, std=0.5)
