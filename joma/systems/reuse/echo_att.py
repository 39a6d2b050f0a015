"""EchoAtt: middle layers share the attention weights of one of them.

Between the first and the last layers, which are left alone, layers stand in
blocks of `share`; the first of a block makes queries and keys, the others take
these and have no such projections: softmax of the same is the same
(https://arxiv.org/abs/2409.14595). A layer that takes has D H (N + K)
parameters fewer, and as many products a token; logits are computed anew, as T x
T weights are never kept. Values, and what each layer makes of them, are its
own.

Paper's settings: the first and the last layers keep weights of their own.

Letters: D width, N query heads, K key heads, H head size, L layers.
"""

import dataclasses
from typing import ClassVar

from joma.transformer import config as configs
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class EchoAtt:
  """Says which layers take queries and keys from the one before.

  Attributes:
    share: Layers of a block; 1 shares nothing.
    first: Layers at the beginning that are left alone.
    last: Layers at the end that are left alone.
  """

  name: ClassVar[str] = "echo_att"
  paper: ClassVar[str] = "https://arxiv.org/abs/2409.14595"
  neutral: ClassVar[str] = "echo_att:share=1"

  share: int = 2
  first: int = 1
  last: int = 1

  def __post_init__(self):
    require.at_least("echo_att: share", self.share, 1)
    require.at_least("echo_att: first", self.first, 0)
    require.at_least("echo_att: last", self.last, 0)

  def is_source(self, config: configs.TransformerConfig, layer: int) -> bool:
    """Whether a layer makes queries and keys itself."""
    is_middle = self.first <= layer < config.num_layers - self.last
    return not is_middle or (layer - self.first) % self.share == 0
