"""Gates of heads as experts, from the router's weights to the loss of balance.

What `moh` says for each token and `moh_blocks` for each block of queries.

Letters: B batch, T tokens, D width, N query heads, E of them routed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


def check(
    name: str, shared: int, active: int, cost: float, start: float
) -> None:
  """Raises UserError if an option of a router of heads makes no sense."""
  require.at_least(f"{name}: shared", shared, 0)
  require.at_least(f"{name}: active", active, 1)
  require.not_negative(f"{name}: cost", cost)
  require.not_negative(f"{name}: start", start)


def draw(
    name: str,
    key: Array,
    config: configs.TransformerConfig,
    shared: int,
    start: float,
) -> dict[str, Array]:
  """Draws W_s of two shared heads or more, W_r, and W_b where any is shared.

  Raises:
    UserError: If no head is left to be routed.
  """
  num_routed = config.num_heads - shared
  if num_routed < 1:
    raise errors.UserError(
        f"{name}: shared={shared} leaves none of num_heads={config.num_heads}"
        " to be routed: share fewer."
    )
  widths = {"routed": num_routed}
  # Softmax over one head is 1, whatever its weights.
  widths |= {"shared": shared} if shared > 1 else {}
  widths |= {"balance": 2} if shared else {}
  size, keys = config.embed_dim, jax.random.split(key, 3)
  normal = (
      lambda key, width: start
      * size**-0.5
      * jax.random.normal(key, (size, width))
  )
  return {
      part: normal(one, width)
      for one, (part, width) in zip(keys, widths.items(), strict=False)
  }


def gates_of(
    params: hooks.Params, x: Float[Array, "B T D"], active: int
) -> Float[Array, "B T N"]:
  """Gates of all heads, float32; exactly 0 for those that are not chosen."""
  probs, chosen = routes(params, x, active)
  kept = jnp.where(chosen, probs, 0.0)
  routed = _num(chosen, active) * kept / kept.sum(axis=-1, keepdims=True)
  if "balance" not in params:
    return routed
  beta = 2 * _probs(params["balance"], x)
  shared = jnp.ones_like(routed[..., :1])
  if "shared" in params:
    shared = params["shared"].shape[1] * _probs(params["shared"], x)
  return jnp.concatenate([beta[..., :1] * shared, beta[..., 1:] * routed], -1)


def routes(
    params: hooks.Params, x: Float[Array, "B T D"], active: int
) -> tuple[Float[Array, "B T E"], Array]:
  """Probabilities of the routed heads, and which are chosen."""
  probs = _probs(params["routed"], x)
  return probs, greatest(probs, active)


def greatest(scores: Float[Array, "*b E"], num: int) -> Array:
  """Whether each is among the `num` greatest, of equals the first."""
  _, which = jax.lax.top_k(scores, min(num, scores.shape[-1]))
  return jax.nn.one_hot(which, scores.shape[-1], dtype=bool).any(axis=-2)


def imbalance(
    params: hooks.Params,
    x: Float[Array, "B T D"],
    active: int,
    is_token: Array,
) -> Float[Array, ""]:
  """E^2 mean over heads of (mean probability x share of tokens)."""
  probs, chosen = routes(params, x, active)
  weight = is_token[..., None] / jnp.maximum(is_token.sum(), 1)
  mean = lambda x: (weight * x).sum(axis=(0, 1))
  return probs.shape[-1] ** 2 * (mean(probs) * mean(chosen)).mean()


def _num(chosen: Array, active: int) -> int:
  return min(active, chosen.shape[-1])


def _probs(
    kernel: Float[Array, "D E"], x: Float[Array, "B T D"]
) -> Float[Array, "B T E"]:
  wide = x.astype(jnp.float32)
  return jax.nn.softmax(jnp.einsum("BTD,DE->BTE", wide, kernel))
