"""Parameters that nothing compiles, and models applied by one program a shape.

Op by op a model of two layers is some hundred programs; compiled as one without
optimization it is fast to compile and to run. A test that patches something
inside wants a program of its own: `fresh_step`.
"""

import functools

import jax
import numpy as np

from joma.transformer import hooks
from joma.transformer import layer_hooks
from joma.transformer.training import lm_step

_OPTIONS = {"xla_backend_optimization_level": "0"}
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options=_OPTIONS)


def params(model, seed=0):
  """Numbers of every shape; scales are 1, and systems start as they do.

  A compiled `init` takes two seconds of any model, which most tests are not
  about.
  """
  tokens = np.zeros((1, 2), np.int32)
  tree = _draw(jax.eval_shape(model.init, jax.random.key(0), tokens), seed)
  for layer in range(model.config.num_layers):
    attn, own = (
        tree[f"layers_{layer}"]["attn"],
        _of_systems(model.config, layer, seed),
    )
    # A layer that takes queries and keys has none of what they are made from.
    attn |= {name: leaf for name, leaf in own.items() if name in attn}
  return jax.device_put(tree)


def layer_params(config, layer, module, *arguments):
  """Of one attention layer, likewise."""
  init = lambda key: module.init(key, *arguments)  # Masks stay known.
  tree = _draw(jax.eval_shape(init, jax.random.key(0)), 0)
  return jax.device_put(tree | _of_systems(config, layer, 0))


def _draw(variables, seed):
  draw = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
          np.ones(leaf.shape, np.float32)
          if path[-1].key == "scale"
          else draw.normal(0, 0.25, leaf.shape).astype(np.float32)
      ),
      variables["params"],
  )


def _of_systems(config, layer, seed):
  key = jax.random.key(seed + layer)
  return {
      system.name: system.init_params(key, config, layer)
      for system in layer_hooks.of_layer(config, layer).systems
      if isinstance(system, hooks.Parametric)
  }


@_jit
def logits(model, params, tokens, positions=None):
  """Of whole texts."""
  return model.apply({"params": params}, tokens, positions=positions)


def _step(model, params, tokens, positions, cache):
  return model.apply(
      {"params": params}, tokens, positions=positions, kv_cache=cache
  )


step = _jit(_step)


def fresh_step():
  """A `step` that is traced anew."""
  return _jit(lambda *arguments: _step(*arguments))


@_jit
def loss_and_grads(model, params, tokens, positions=None):
  """Mean square of the logits, which come third, and its gradients.

  Gradients, not the mean square, have those of the systems' losses with them.
  """

  def loss(params):
    found, extra = lm_step.apply_with_losses(
        model, params, tokens, positions=positions
    )
    value = (found**2).mean()
    return value + (0 if extra is None else extra), (value, found)

  (_, (value, found)), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, grads, found


def fresh_masked(model, is_traced=False):
  """Logits under a mask, which is one of the program's arguments if traced."""

  def run(params, tokens, mask):
    return model.apply({"params": params}, tokens, mask=mask)

  if is_traced:
    return jax.jit(run, compiler_options=_OPTIONS)
  return lambda params, tokens, mask: jax.jit(
      functools.partial(run, mask=mask), compiler_options=_OPTIONS
  )(params, tokens)
