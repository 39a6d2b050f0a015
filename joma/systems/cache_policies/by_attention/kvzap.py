"""What a small network says that KVzip would: nothing is read twice.

  log s = v + gelu(u + x U) V, of a layer's input x, an s for each key head

`profiles.kvzip_surrogate` fits U, u, V, v to KVzip's own scores.

Letters: B batch, T tokens of a prompt, L layers, D width of the model, R of the
network, K key and value heads.
"""

import dataclasses
import functools
import os
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num
import numpy as np

from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rules
from scansnap_jax.experiment import errors


class Network(NamedTuple):
  """Of one layer, or of all with L in front.

  Attributes:
    inner: U.
    inner_bias: u.
    outer: V.
    outer_bias: v.
  """

  inner: Num[Any, "*L D R"]
  inner_bias: Num[Any, "*L R"]
  outer: Num[Any, "*L R K"]
  outer_bias: Num[Any, "*L K"]


def log_scores(
    network: Network, x: Float[Array, "*B D"]
) -> Float[Array, "*B K"]:
  """The logarithm of KVzip's score, as a layer's network says it.

  Scores lie between 0 and 1 over many orders of magnitude, and whether a key
  may leave is decided among small ones: the error of a logarithm is relative,
  where a squared error of the scores would see the few large ones alone.
  """
  times = lambda a, b: jnp.matmul(a, b, precision="highest")
  rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  hidden = jax.nn.gelu(times(rows, network.inner) + network.inner_bias[None])
  found = times(hidden, network.outer) + network.outer_bias[None]
  return found.reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzap(policy_lib.Policy):
  """A network's guess of KVzip's score, from the layer's input (KVzap).

  The paper (https://arxiv.org/abs/2601.07891) predicts the logarithm of a score
  of KVzip's kind from hidden states, by a network a layer, and drops what is
  below a threshold; here the least leaves, and `dms:threshold=X:kvzap:...` is
  the threshold. A key is judged once, when it enters, in prompts and in steps.

  Paper's settings: networks trained on 1.2 million samples, a threshold on the
  logarithm of the score.

  Attributes:
    weights: File of the networks, which a program reads when it is compiled.
  """

  label: ClassVar[str] = "KVzap"
  uses_input: ClassVar[bool] = True
  estimates_attention: ClassVar[bool] = True
  num_recent: int | None = 0
  weights: str = ""

  def read_prompt(self, prompt: policy_lib.Prompt) -> rules.Prompted:
    heads = prompt.key.shape[2]
    score = self._score(prompt.x, prompt.layer, heads)
    return score.swapaxes(1, 2), None, None

  def enter(
      self, token: policy_lib.Token, state: rules.Arrays
  ) -> rules.Entered:
    heads = token.key.shape[1]
    return self._score(token.x, token.layer, heads), None, state

  def _score(
      self, x: Float[Array, "*B D"] | None, layer: int, num_kv_heads: int
  ) -> Float[Array, "*B K"]:
    if x is None:
      raise errors.UserError(
          "kvzap reads a layer's input, which is not given here: it goes with"
          " caches of slots in a model, not with keys and values alone."
      )
    networks = load(self.weights)
    expected = (x.shape[-1], num_kv_heads)
    found = (networks.inner.shape[1], networks.outer.shape[2])
    if found != expected or layer >= len(networks.inner):
      raise errors.UserError(
          f"weights={self.weights} is of {len(networks.inner)} layers of width"
          f" {found[0]} with {found[1]} key heads; layer {layer} here is of"
          f" width {expected[0]} with {expected[1]}: fit one to this model."
      )
    return jnp.exp(log_scores(Network(*(p[layer] for p in networks)), x))


def save(path: str | os.PathLike[str], networks: Network) -> None:
  """Writes the networks of all layers."""
  with open(path, "wb") as file:
    np.savez(file, **networks._asdict())


def load(path: str) -> Network:
  """Reads what `save` has written.

  Raises:
    UserError: There is no such file, or it holds something else.
  """
  if not path:
    raise errors.UserError(
        "kvzap needs the networks of its model, as kvzap:weights=FILE;"
        " python -m launch.bench.language.kvzap_fit --model=DIR fits them."
    )
  try:
    return _load(path, os.stat(path).st_mtime_ns)
  except (OSError, ValueError, KeyError) as error:
    raise errors.UserError(
        f"weights={path} holds no networks of kvzap: {error}."
    ) from error


@functools.lru_cache(maxsize=8)
def _load(path: str, changed: int) -> Network:
  del changed  # A file that is written anew is read anew.
  with np.load(path) as found:
    return Network(*(np.asarray(found[name]) for name in Network._fields))
