"""The texts and models of `flux`: prompts that need far keys, and near ones.

A needle text is links of two kinds, a to b and b to c, two tokens each and in
any order, then nothing for as long as a window, then what is asked: a marker
and a token, whose answer is one link away, or two. Two links need two layers
that read far. Texts that help ask for what follows b too: the two links are
learned sooner, but a near layer finds there what another has read far. A local
text is symbols of its own; each of its last tokens is to say the one a few
places before it.

Letters: B texts, T tokens, M chains of a text, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
import numpy as np

from joma.studies import texts
from joma.systems.routers import flux
from joma.systems.score_rules import convolved
from joma.transformer import config as configs

NEEDLE, LOCAL = 0, 1
# How far back a local text's answer stands: a short convolution does not reach.
_BACK = 4
_POOL, _HIDDEN = 4, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
  """Needle texts and local ones by turns: `texts.Task`.

  Attributes:
    num_chains: M.
    num_symbols: Of each kind: a, b, c and local ones, then nothing and the two
      markers.
    window: Tokens of nothing between the links and what is asked.
    helps: Whether needle texts ask for what follows b too.
    kind: NEEDLE or LOCAL for all texts; None is by turns.
  """

  num_chains: int
  num_symbols: int
  window: int
  helps: bool = False
  kind: int | None = None

  @property
  def vocab_size(self) -> int:
    """Tokens that there are."""
    return 4 * self.num_symbols + 3

  @property
  def seq_len(self) -> int:
    """T: links, nothing, and three questions a chain."""
    return 10 * self.num_chains + self.window

  def draw(self, key: Array, num_texts: int) -> texts.Texts:
    """Draws texts; of needle texts answers two links away are scored."""
    keys = jax.random.split(key)
    needle = self._needle(keys[0], num_texts)
    local = self._local(keys[1], num_texts)
    is_local = jnp.arange(num_texts) % 2 == 1
    if self.kind is not None:
      is_local = jnp.full(num_texts, self.kind == LOCAL)
    choose = lambda one, two: jnp.where(is_local[:, None], two, one)
    return jax.tree.map(choose, needle, local)

  def _needle(self, key: Array, num_texts: int) -> texts.Texts:
    keys = jax.random.split(key, 5)
    size, num = self.num_symbols, self.num_chains
    draw = lambda key, count: jax.vmap(
        lambda key: jax.random.permutation(key, count)
    )(jax.random.split(key, num_texts))
    a, b, c = (
        i * size + draw(one, size)[:, :num] for i, one in enumerate(keys[:3])
    )
    links = jnp.concatenate(
        [jnp.stack([a, b], axis=-1), jnp.stack([b, c], axis=-1)], axis=1
    )
    take = lambda x, order: jnp.take_along_axis(x, order, axis=1)
    links = take(links, draw(keys[3], 2 * num)[..., None])
    asked, said = jnp.concatenate([a, a], axis=1), jnp.concatenate([c, b], 1)
    one, two = 4 * size + 1, 4 * size + 2
    marker = jnp.concatenate([jnp.full_like(a, two), jnp.full_like(a, one)], 1)
    if self.helps:
      asked = jnp.concatenate([asked, b], axis=1)
      said = jnp.concatenate([said, c], axis=1)
      marker = jnp.concatenate([marker, jnp.full_like(b, one)], axis=1)
    order = draw(keys[4], asked.shape[1])
    asked, said, marker = (take(x, order) for x in (asked, said, marker))
    pairs = lambda one, two: jnp.stack([one, two], axis=-1).reshape(
        num_texts, -1
    )
    ends = pairs(marker, asked)
    rest = self.seq_len - 4 * num - ends.shape[1]
    nothing = jnp.full((num_texts, rest), 4 * size)
    tokens = jnp.concatenate(
        [links.reshape(num_texts, -1), nothing, ends], axis=1
    )
    before = lambda x: jnp.pad(x, ((0, 0), (tokens.shape[1] - x.shape[1], 0)))
    targets = before(pairs(jnp.zeros_like(said), said))
    is_two = before(pairs(jnp.zeros_like(said), marker == two))
    return texts.Texts(tokens, targets, targets > 0, is_two > 0)

  def _local(self, key: Array, num_texts: int) -> texts.Texts:
    shape, size = (num_texts, self.seq_len), self.num_symbols
    tokens = 3 * size + jax.random.randint(key, shape, 0, size)
    targets = jnp.roll(tokens, _BACK, axis=1)
    place = jnp.arange(self.seq_len)[None]
    is_asked = jnp.broadcast_to(
        place >= self.seq_len - 2 * self.num_chains, shape
    )
    return texts.Texts(tokens, targets, is_asked, is_asked)


def learner(
    task: Prompts, entries: tuple[str, ...], width: int, batch_size: int
) -> texts.Learner:
  """A model of two layers, with short convolutions.

  Args:
    task: Draws texts.
    entries: Of each layer, as `entry` gives them.
    width: Of the residual stream, of heads of 16 channels.
    batch_size: Texts of a step.
  """
  heads = width // 16
  model = configs.TransformerConfig(
      vocab_size=task.vocab_size,
      num_layers=2,
      embed_dim=width,
      num_heads=heads,
      num_kv_heads=heads,
      head_dim=16,
      hidden_dim=2 * width,
      max_len=task.seq_len,
      attention=entries,
  )
  return texts.Learner(model=model, task=task, batch_size=batch_size)


def entry(window: int, cost: float, route: str | float) -> str:
  """Of a layer: a forced route, full or sparse, or a target of the router's."""
  name = f"{flux.Flux.name}:sinks=1:window={window}"
  if isinstance(route, str):
    name += f":force={route}"
  else:
    name += f":pool={_POOL}:hidden={_HIDDEN}:start=0.1:cost={cost}"
    name += f":target={route}"
  return f"{name}+{convolved.Convolved.name}:width=4"


def laid_over(drawn: PyTree, known: PyTree) -> PyTree:
  """Parameters of a model, those that another has taken from there."""
  if not isinstance(drawn, dict):
    return known
  return {
      name: laid_over(value, known[name]) if name in known else value
      for name, value in drawn.items()
  }


def look(
    problem: texts.Learner, params: PyTree, key: Array, kind: int, num: int
) -> tuple[Float[Array, ""], Float[Array, "L B"] | None]:
  """Reads new texts of one kind.

  Returns:
    Share of right answers, and each layer's probability of reading everything;
    None where routes are forced.
  """
  assert isinstance(problem.task, Prompts)  # `learner` gives no other.
  task = dataclasses.replace(problem.task, kind=kind)
  found = task.draw(key, num)
  logits, seen = problem.transformer.apply(
      {"params": params}, found.tokens, mutable="intermediates"
  )
  _, score = problem.measured(logits, found)
  name = f"{flux.Flux.name}_full_prob"
  sown: Any = seen["intermediates"]
  layers = [sown[f"layers_{i}"]["attn"] for i in (0, 1)]
  if name not in layers[0]:
    return score, None
  return score, jnp.stack([layer[name][0] for layer in layers])


def auc(above: np.ndarray, below: np.ndarray) -> float:
  """Share of pairs in which the first is greater; of equal ones a half."""
  apart = np.asarray(above)[:, None] - np.asarray(below)[None]
  return float((apart > 0).mean() + 0.5 * (apart == 0).mean())
