"""Selective self-attention: a temperature for each query, and for each value.

  logits_ts = scale tau_t q_t k_s,   v_s -> tau'_s v_s
  tau_t     = tanh(f(x_t)) + 1 + sigmoid(alpha) ln n_t

with n_t the tokens that t sees and f of two layers; values have an f and an
alpha of their own (https://arxiv.org/abs/2411.12892). Softmax dilutes: a key
that leads n - 1 equal ones by c has weight 1 / (1 + (n - 1) e^-c). With tau =
1 + a ln n its weight tends to 1 where a c > 1, to 0 where a c < 1, and to
1 / (1 + e^-c) where a c = 1.

Paper's settings: queries and values, less than .5 % of parameters more.

Letters: B batch, T tokens, D width, R hidden units of f, N query heads, K key
and value heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.transformer import config as configs
from joma.transformer import hooks
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class Ssa:
  """A rule that prepares queries and values.

  Attributes:
    width: R; 0 leaves f out.
    start: alpha before training.
  """

  name: ClassVar[str] = "ssa"
  paper: ClassVar[str] = "https://arxiv.org/abs/2411.12892"
  neutral: ClassVar[str] = "ssa:width=0:start=-1e9"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      "query_alpha": ("tensor",),
      "query_in": ("fsdp", None),
      "query_out": (None, "tensor"),
      "value_alpha": ("tensor",),
      "value_in": ("fsdp", None),
      "value_out": (None, "tensor"),
  }

  width: int = 8
  start: float = 0.0

  def __post_init__(self):
    require.at_least("ssa: width", self.width, 0)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns alpha [N] or [K], and f's matrices [D, R] and [R, N]."""
    found: dict[str, Array] = {}
    keys = iter(jax.random.split(key, 4))
    normal = lambda shape: (
        shape[0] ** -0.5 * jax.random.normal(next(keys), shape)
    )
    for of, heads in (
        ("query", config.num_heads),
        ("value", config.num_kv_heads),
    ):
      found[f"{of}_alpha"] = jnp.full((heads,), self.start, jnp.float32)
      if self.width:
        found[f"{of}_in"] = normal((config.embed_dim, self.width))
        found[f"{of}_out"] = 0.1 * normal((self.width, heads))
    return found

  def init_state(
      self, config: configs.TransformerConfig, layer: int, batch_size: int
  ) -> None:
    """None: a token needs nothing of others."""

  def prepare(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "#B T N H"],
      key: Float[Array, "#B T K H"],
      value: Float[Array, "B T K H"],
      state: PyTree,
  ) -> tuple[Array, Array, Array, PyTree]:
    """Returns queries and values by their temperatures."""
    num_seen = call.positions + 1
    if call.options.window is not None:
      num_seen = jnp.minimum(num_seen, call.options.window)
    scaled = (
        lambda x, of: x
        * temperature(params, of, call.x, num_seen).astype(x.dtype)[..., None]
    )
    return scaled(query, "query"), key, scaled(value, "value"), state


def temperature(
    params: hooks.Params,
    of: str,
    x: Float[Array, "B T D"],
    num_seen: Int[Array, "B T"],
) -> Float[Array, "B T N"]:
  """Tau of each token and head, float32.

  Args:
    params: Of one layer.
    of: query or value.
    x: What the layer reads.
    num_seen: Tokens that each sees, itself included.
  """
  log_n = jnp.log(jnp.maximum(num_seen, 1).astype(jnp.float32))
  alpha = jax.nn.sigmoid(params[f"{of}_alpha"])
  tau = 1 + jnp.einsum("BT,N->BTN", log_n, alpha)
  if f"{of}_in" not in params:
    return tau
  inner = jnp.einsum("BTD,DR->BTR", x.astype(jnp.float32), params[f"{of}_in"])
  outer = jnp.einsum("BTR,RN->BTN", jax.nn.gelu(inner), params[f"{of}_out"])
  return tau + jnp.tanh(outer)
