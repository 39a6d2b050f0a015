"""What is measured of a text, as the page shows it.

Letters: L layers, N query heads, K KV heads, T tokens of the text, E keys that
are kept of a query, P policies.
"""

import math
from typing import NamedTuple

from jaxtyping import Bool, Float, Integer
import numpy as np

from joma.systems.probes import maps

# Of the tokens; those with the most attention are a text's heavy hitters.
HEAVY_SHARE = 0.05


class Attention(NamedTuple):
  """Attention of all heads to a text; every token is a query once.

  Attributes:
    keys: The keys with the largest weights of a query, largest first.
    weights: Of these keys.
    totals: What a query gives to all of its keys: 1, or less where a model has
      sinks of its own.
    received: What a token gets from all queries, summed.
    shares: Of a query's attention, what lies on tokens that a policy still
      has, of each policy.
    entropy: Of a query's weights, in nats, mean over queries.
    sink_mass: The weight of the first token, mean over queries.
    induction: Weight on the token behind an earlier occurrence of the query's
      own, mean over a text of random tokens that stands twice.
  """

  keys: Integer[np.ndarray, "L N T E"]
  weights: Float[np.ndarray, "L N T E"]
  totals: Float[np.ndarray, "L N T"]
  received: Float[np.ndarray, "L N T"]
  shares: Float[np.ndarray, "P L N T"]
  entropy: Float[np.ndarray, "L N"]
  sink_mass: Float[np.ndarray, "L N"]
  induction: Float[np.ndarray, "L N"]

  def sinks(self) -> Bool[np.ndarray, "L N T"]:
    """Which tokens get more than .3 of all attention of a head."""
    return self.received > maps.SINK_THRESHOLD * self.received.shape[-1]

  def heavy(self) -> Bool[np.ndarray, "L N T"]:
    """The twentieth of the tokens that get most attention, sinks aside.

    H2O's measure (https://arxiv.org/abs/2306.14048), over the whole text.
    """
    size = self.received.shape[-1]
    mass = np.where(self.sinks(), -1.0, self.received)
    place = np.argsort(np.argsort(-mass, axis=-1, kind="stable"), axis=-1)
    return (place < math.ceil(HEAVY_SHARE * size)) & (mass > 0)

  def of_head(self, layer: int, head: int) -> Float[np.ndarray, "T T"]:
    """A head's map; 0 for keys that are not among the E of a query."""
    keys = self.keys[layer, head].astype(np.int64)
    found = np.zeros((len(keys), len(keys)))
    np.put_along_axis(found, keys, self.weights[layer, head], axis=1)
    return found


class Evictions(NamedTuple):
  """What a policy let go of a text.

  Attributes:
    name: As flags give it.
    label: As its paper writes it.
    slots: Of a KV head, as granted.
    left_at: The first query that sees a token no more; T where all do.
    losses: Cross-entropy in nats of the token after each, with what is kept;
      NaN at the last, and where a prompt was read at once.
  """

  name: str
  label: str
  slots: int
  left_at: Integer[np.ndarray, "L K T"]
  losses: Float[np.ndarray, "T"]

  def is_kept(self, layer: int, head: int, query: int) -> Bool[np.ndarray, "T"]:
    """Which tokens a KV head has when a query attends, its own among them."""
    tokens = np.arange(self.left_at.shape[-1])
    return (tokens <= query) & (self.left_at[layer, head] > query)


class Recording(NamedTuple):
  """A text, read by a model.

  Attributes:
    model: Name of the model.
    pieces: Text of each token.
    num_prompt: Tokens that are the user's; the others are the model's.
    reading: As `ExploreConfig` has it.
    attention: With all keys.
    losses: Likewise with all keys, of all tokens but the last.
    policies: Evictions of each.
  """

  model: str
  pieces: tuple[str, ...]
  num_prompt: int
  reading: str
  attention: Attention
  losses: Float[np.ndarray, "T"]
  policies: tuple[Evictions, ...]

  def first_step(self) -> int:
    """The first query that is a decode step: the first that may miss a key."""
    num_tokens = len(self.pieces)
    at_once = self.num_prompt if self.reading == "prompt" else 0
    return min(at_once, num_tokens - 1)

  def mean_shares(self) -> Float[np.ndarray, "P L N"]:
    """Share of a head's attention on kept tokens, mean over decode steps."""
    return self.attention.shares[..., self.first_step() :].mean(axis=-1)
