"""Heads chosen without a router: those whose queries are greatest.

  out'_h = out_h for the shared heads, and for the K others of the greatest
           |q_h|; 0 for the rest

The parameter-free rule by which MoH starts from a trained checkpoint
(https://arxiv.org/abs/2410.11842): there the norms are divided by their
deviation over heads and pass softmax, which change no order. Beside it stand
heads drawn at random, anew for each token, and a fixed list, which is how one
sees what the rule is worth.

Paper's settings: as `moh`, where its training starts.

Letters: B batch, T tokens, N query heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.systems import dotted
from joma.systems.routers import head_gates
from joma.transformer import hooks
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class MohNorms:
  """A router without parameters, for any checkpoint.

  Attributes:
    active: K, heads that a token has besides the shared ones.
    shared: Heads that every token has, the first ones.
    by: norms, or random.
    heads: The same for all tokens instead, by their numbers with dots between,
      as 0.3.5, for all layers.
  """

  name: ClassVar[str] = "moh_norms"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.11842"
  neutral: ClassVar[str] = "moh_norms:active=1048576"

  active: int = 4
  shared: int = 0
  by: str = "norms"
  heads: str = ""

  def __post_init__(self):
    require.at_least("moh_norms: active", self.active, 1)
    require.at_least("moh_norms: shared", self.shared, 0)
    require.one_of("moh_norms: by", self.by, ("norms", "random"))
    dotted.numbers("moh_norms: heads", self.heads)

  def gate(
      self,
      params: hooks.Params,
      call: hooks.Call,
      head_out: Float[Array, "B T N H"],
  ) -> tuple[Float[Array, "B T N H"], dict[str, Float[Array, ""]]]:
    """Returns the outputs of the chosen heads, and no loss."""
    is_active = self.chosen(call, head_out.shape[2])[..., None]
    return jnp.where(is_active, head_out, 0), {}

  def chosen(self, call: hooks.Call, num_heads: int) -> Bool[Array, "B T N"]:
    """Which heads each token has.

    Raises:
      UserError: If the layer has fewer heads than are shared or named.
    """
    named = dotted.numbers("moh_norms: heads", self.heads)
    if max([self.shared - 1, *named]) >= num_heads:
      raise errors.UserError(
          f"moh_norms: shared={self.shared} and heads={self.heads!r} must be"
          f" among the {num_heads} heads."
      )
    place = jnp.arange(num_heads)
    if named:
      fixed = jnp.isin(place, jnp.array(named))[None, None]
      return jnp.broadcast_to(fixed, (*call.positions.shape, num_heads))
    scores = jnp.where(place < self.shared, jnp.inf, self._scores(call))
    return head_gates.greatest(scores, self.shared + self.active)

  def _scores(self, call: hooks.Call) -> Float[Array, "B T N"]:
    assert call.made is not None  # A layer gives it to its gate.
    query = call.made.query.astype(jnp.float32)
    if self.by == "norms":
      return jnp.square(query).sum(axis=-1)
    # By position, so that a step draws what a pass has drawn.
    key = jax.random.fold_in(jax.random.key(0), call.layer)
    draw = lambda at: jax.random.uniform(
        jax.random.fold_in(key, at), (query.shape[2],)
    )
    return jax.vmap(jax.vmap(draw))(jnp.maximum(call.positions, 0))
