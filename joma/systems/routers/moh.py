"""Mixture of heads: heads as experts, some shared, the others chosen by token.

  g_shared = beta_1 n_s softmax(x W_s),   n_s the first heads
  g_routed = beta_2 K softmax(x W_r), over its K greatest, 0 for the others
  beta     = 2 softmax(x W_b)
  out'_h   = g_h out_h

so that gates are 1 where all heads are routed and all weights 0: multi-head
attention (https://arxiv.org/abs/2410.11842). Without shared heads there is no
beta. The loss of balance is E^2 times the mean over the E routed heads of
(mean probability x mean share of tokens that chose the head): K where routing
is uniform. Each token chooses for itself, and what it does not choose is still
computed: `moh_blocks` routes by blocks of queries, which kernels then skip. Key
heads are not sparse under grouped queries.

Paper's settings: 50 to 90 % of the heads, 75 % of Llama 3 8B's.

Letters: B batch, T tokens, D width, N query heads, E of them routed, H head
size.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from joma.systems.routers import head_gates
from joma.transformer import config as configs
from joma.transformer import hooks


@dataclasses.dataclass(frozen=True)
class Moh:
  """A router.

  Attributes:
    shared: Heads that every token has, the first ones.
    active: K, heads of the others that a token has.
    cost: Factor of the loss of balance.
    start: Standard deviation of W before training, times the square root of D.
  """

  name: ClassVar[str] = "moh"
  paper: ClassVar[str] = "https://arxiv.org/abs/2410.11842"
  neutral: ClassVar[str] = "moh:active=1048576:start=0"
  axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
      name: ("fsdp", None) for name in ("shared", "routed", "balance")
  }

  shared: int = 1
  active: int = 2
  cost: float = 0.01
  start: float = 1.0

  def __post_init__(self):
    head_gates.check("moh", self.shared, self.active, self.cost, self.start)

  def init_params(
      self, key: Array, config: configs.TransformerConfig, layer: int
  ) -> dict[str, Array]:
    """Returns W_s [D, n_s], W_r [D, E] and W_b [D, 2], where they matter."""
    return head_gates.draw(self.name, key, config, self.shared, self.start)

  def gate(
      self,
      params: hooks.Params,
      call: hooks.Call,
      head_out: Float[Array, "B T N H"],
  ) -> tuple[Float[Array, "B T N H"], dict[str, Float[Array, ""]]]:
    """Returns the outputs by their gates; `losses` has the loss."""
    gates = head_gates.gates_of(params, call.x, self.active)
    return gates[..., None].astype(head_out.dtype) * head_out, {}

  def losses(
      self, params: hooks.Params, call: hooks.Call, made: hooks.Made
  ) -> dict[str, Float[Array, ""]]:
    """Returns the loss of balance, by its factor."""
    is_token = call.positions >= 0
    found = head_gates.imbalance(params, call.x, self.active, is_token)
    return {"balance": self.cost * found}
