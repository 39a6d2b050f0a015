"""Models applied by one compiled program a shape, whichever test asks.

Op by op a model of two layers is some hundred programs; compiled as one without
optimization it is fast to compile and to run. A test that patches something
inside wants a program of its own: `fresh_step`.
"""

import functools

import jax

from joma.transformer.training import lm_step

_OPTIONS = {"xla_backend_optimization_level": "0"}
_jit = functools.partial(jax.jit, static_argnums=0, compiler_options=_OPTIONS)


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
