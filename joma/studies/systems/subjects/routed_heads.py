"""The models of `moh`: one layer whose heads must be chosen by a token's class.

A token is a symbol of one of two classes. A token of the first class is to say
the n symbols before it, of the second class the n before those. Queries and
keys are of positions alone and there is no MLP, so that a head reads one place
whatever the class is: 2 n heads are needed, n for each class, and nothing but
gates can tell which of them is heard.

Letters: B texts, T tokens, V symbols, D width, E routed heads.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np
import optax

from joma.systems.routers import head_gates
from joma.systems.routers import moh
from joma.systems.routers import moh_blocks
from joma.systems.score_rules import positional
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer.weighing import merged
from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.attention import visits

_HEAD_DIM = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
  """Two classes of tokens and a layer: a `training.Problem`.

  Attributes:
    num_each: n, places that a class reads; there are 2 n heads.
    is_routed: Whether each token hears n heads of its own choice, not all.
    num_symbols: V.
    seq_len: T.
    batch_size: B.
    width: D.
  """

  num_each: int
  is_routed: bool
  num_symbols: int
  seq_len: int
  batch_size: int
  width: int

  @property
  def layer(self) -> attention.Attention:
    """The layer."""
    entry = positional.Positional.name
    if self.is_routed:
      entry += f"+{moh.Moh.name}:shared=0:active={self.num_each}"
    heads = 2 * self.num_each
    config = configs.TransformerConfig(
        num_layers=1,
        embed_dim=self.width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_HEAD_DIM,
        max_len=self.seq_len,
        positions="none",
        attention=(entry,),
    )
    return attention.Attention(config, 0, implementation="reference")

  def draw(
      self, key: Array
  ) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T n"]]:
    """Draws symbols, classes, and the symbols that are to be said."""
    keys, shape = jax.random.split(key), (self.batch_size, self.seq_len)
    symbol = jax.random.randint(keys[0], shape, 0, self.num_symbols)
    kind = jax.random.randint(keys[1], shape, 0, 2)
    back = [jnp.roll(symbol, 1 + i, axis=1) for i in range(2 * self.num_each)]
    near, far = np.split(np.arange(2 * self.num_each), 2)
    choose = lambda which: jnp.stack([back[i] for i in which], axis=-1)
    target = jnp.where(kind[..., None] == 0, choose(near), choose(far))
    return symbol, kind, target

  def init(self, key: Array) -> PyTree:
    """Draws embeddings of symbols and classes, the layer and the read-out."""
    keys, shape = jax.random.split(key, 4), (1, self.seq_len, self.width)
    normal = lambda key, *shape: jax.random.normal(key, shape)
    place = jnp.arange(self.seq_len)[None]
    layer = self.layer.init(
        keys[2], jnp.zeros(shape), place, masks.causal(self.seq_len)
    )
    out = normal(keys[3], self.width, self.num_each, self.num_symbols)
    return {
        "symbol": normal(keys[0], self.num_symbols, self.width),
        "class": normal(keys[1], 2, self.width),
        "out": self.width**-0.5 * out,
        "layer": layer["params"],
    }

  def loss(self, params: PyTree, key: Array) -> tuple[Array, Array]:
    """Cross-entropy with the layer's own losses; share of right answers."""
    symbol, kind, target = self.draw(key)
    x = embed(params, symbol, kind)
    places = jnp.broadcast_to(jnp.arange(self.seq_len)[None], symbol.shape)
    (out, _, _), found = self.layer.apply(
        {"params": params["layer"]},
        x,
        places,
        masks.causal(self.seq_len),
        mutable=["losses"],
    )
    logits = jnp.einsum("BTD,DnV->BTnV", x + out, params["out"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    # The first tokens have not so many before them.
    told = slice(2 * self.num_each, None)
    extra = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found))
    is_right = logits.argmax(axis=-1) == target
    return losses[:, told].mean() + extra, is_right[:, told].mean()

  def routes(
      self, params: PyTree, key: Array
  ) -> tuple[Bool[Array, "B T E"], Int[Array, "B T"]]:
    """Which heads the tokens of new texts choose, and their classes."""
    symbol, kind, _ = self.draw(key)
    own = params["layer"][moh.Moh.name]
    x = embed(params, symbol, kind)
    return head_gates.routes(own, x, self.num_each)[1], kind


def embed(
    params: PyTree, symbol: Int[Array, "B T"], kind: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  """What the layer reads."""
  return params["symbol"][symbol] + params["class"][kind]


def information(
    chosen: Bool[np.ndarray, "*t E"], kind: Int[np.ndarray, "*t"]
) -> float:
  """Mutual information of the set that is chosen and the class.

  Returns:
    I(set; class) / H(class) of the counts: 0 where they have nothing to do with
    one another, 1 where the set tells the class.
  """
  number = (chosen * 2 ** np.arange(chosen.shape[-1])).sum(axis=-1).ravel()
  sets, which = np.unique(number, return_inverse=True)
  counts = np.zeros((len(sets), 2))
  np.add.at(counts, (which, np.ravel(kind)), 1)
  joint = counts / counts.sum()
  by_set, by_class = joint.sum(axis=1), joint.sum(axis=0)
  both = _entropy(by_set) + _entropy(by_class) - _entropy(joint.ravel())
  return both / _entropy(by_class)


def _entropy(probs: np.ndarray) -> float:
  probs = probs[probs > 0]
  return float(-(probs * np.log2(probs)).sum())


def tiles(
    seq_len: int, block: int, num_heads: int, active: int, seed: int
) -> dict[str, Any]:
  """Counts and times attention that is routed by blocks of queries.

  Args:
    seq_len: T.
    block: Queries of a block, and keys of a tile.
    num_heads: Heads, half of `active` shared.
    active: Heads of each block, the shared ones included.
    seed: Of vectors and router.

  Returns:
    Tiles "visited" of "every" causal one; median seconds of a call routed
    ("routed"), by all heads on the same tiles ("all_heads"), and of plain
    causal attention ("plain").
  """
  shared = active // 2
  system = moh_blocks.MohBlocks(
      shared=shared, active=active - shared, block=block
  )
  width, size = 64, 64
  config = configs.TransformerConfig(embed_dim=width, num_heads=num_heads)
  keys = jax.random.split(jax.random.key(seed), 3)
  params = system.init_params(keys[0], config, 0)
  x = jax.random.normal(keys[1], (1, seq_len, width))
  gates = head_gates.gates_of(params, x[:, ::block], system.active)
  causal = masks.causal(seq_len)
  routed = system.select(gates, causal, seq_len)
  every = system.select(jnp.ones_like(gates), causal, seq_len)
  vectors = jax.random.normal(keys[2], (3, 1, seq_len, num_heads, size))
  where = {"routed": routed, "all_heads": every, "plain": causal}
  calls = {name: _attending(vectors, each) for name, each in where.items()}
  return {
      "visited": _count(routed, seq_len, block),
      "every": num_heads * _count(causal, seq_len, block),
      **_seconds(calls),
  }


def _count(where: hooks.Where, length: int, block: int) -> int:
  states = visits.states_of(where, length, length, block, block)
  return int((np.asarray(states) > selection.EMPTY).sum())


def _attending(vectors: Array, where: hooks.Where) -> Any:
  scale = vectors.shape[-1] ** -0.5
  options = hooks.AttentionOptions(scale=scale, implementation="xla")
  run = jax.jit(lambda q, k, v: merged.attend(q, k, v, where, options).out)
  return functools.partial(run, *vectors)


def _seconds(calls: dict[str, Any], num_rounds: int = 7) -> dict[str, float]:
  """Median seconds of each call; they take turns, after one that compiles."""
  found: dict[str, list[float]] = {name: [] for name in calls}
  for number in range(num_rounds + 1):
    for name, call in calls.items():
      started = time.perf_counter()
      jax.block_until_ready(call())
      if number:
        found[name].append(time.perf_counter() - started)
  return {name: float(np.median(values)) for name, values in found.items()}
