"""Thresholds of `Cats` and `Teal`, calibrated as quantiles of activations.

The threshold of a layer is the quantile 1 - s of the sizes that its numbers
have on some texts: then a share s is above it, there.

Letters: L layers, B texts, T tokens, Q shares.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity.study import capture
from joma.transformer import model as models
from kernels_pallas import activations


def calibrate(
    model: models.Transformer,
    params: PyTree,
    texts: Int[Array, "B T"],
    shares: Sequence[float],
) -> dict[str, Float[Array, "L Q"]]:
  """Returns the thresholds `cats`, `teal` and `teal_inputs` for each share.

  Args:
    model: The dense model.
    params: Its parameters.
    texts: Token ids, none of those that are measured on.
    shares: What is to remain, each in (0, 1].

  Raises:
    UserError: If a share is out of range.
  """
  for share in shares:
    contextual_config.require_share("share", share)
  return _calibrate(model, params, texts, tuple(shares))


@functools.partial(jax.jit, static_argnames=("model", "shares"))
def _calibrate(
    model: models.Transformer,
    params: PyTree,
    texts: Int[Array, "B T"],
    shares: tuple[float, ...],
) -> dict[str, Float[Array, "L Q"]]:
  _, seen = model.apply(
      {"params": params},
      texts,
      mutable="intermediates",
      capture_intermediates=lambda module, _: module.name == "mlp_norm",
  )
  seen: Any = seen["intermediates"]
  config, found = model.config, {"cats": [], "teal": [], "teal_inputs": []}
  layer_in = seen["resid_embed"][0]
  for layer in range(config.num_layers):
    here = seen[f"layers_{layer}"]
    resid = capture.mlp_input(config, layer_in, here["resid_attn"][0])
    # A norm after the sum has been applied to the stream already.
    is_after = config.norm_placement == "post"
    x = resid if is_after else here["mlp_norm"]["__call__"][0]
    hidden_pre = here["mlp"]["hidden_pre"][0]
    activation = activations.ACTIVATIONS[config.activation](hidden_pre)
    for name, values in (
        ("cats", activation),
        ("teal", here["mlp"]["hidden"][0]),
        ("teal_inputs", x),
    ):
      found[name].append(least_of_share(values, jnp.array(shares)))
    layer_in = here["resid_mlp"][0]
  return {name: jnp.stack(values) for name, values in found.items()}


def least_of_share(
    values: Float[Array, "*b"], shares: Float[Array, "Q"]
) -> Float[Array, "Q"]:
  """The sizes above which a share of the numbers lies; 0 for all of them."""
  sizes = jnp.abs(values.astype(jnp.float32)).reshape(-1)
  found = jnp.quantile(sizes, 1 - shares, method="higher")
  return jnp.where(shares >= 1, 0, found)
