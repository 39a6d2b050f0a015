"""Fits networks that say from a layer's input what KVzip would score.

Texts are read as KVzip reads them, twice with its request between, and of each
of their tokens every layer's input is noted and the score of each key head.
Networks of all layers then learn the logarithm of the scores side by side:

  loss = mean (log s' - max(log s, FLOOR))^2

by AdamW on batches that are a pure function of (seed, step). See `kvzap`.

Letters: B texts, T tokens of a text, R rows (tokens of all texts), L layers, D
width, K key heads, H head size, N query heads.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np
import optax

from joma.inference.cache import calls
from joma.inference.cache import prompts
from joma.inference.cache import rehearsal
from joma.inference.cache import tokens as tokens_lib
from joma.systems.cache_policies.by_attention import kvzap
from joma.systems.cache_policies.by_attention import kvzip
from joma.transformer import hooks
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require

# Of the logarithm: what is smaller is nothing, whatever it is.
FLOOR = float(np.log(1e-6))


class Seen(NamedTuple):
  """Tokens of texts, as the layers see them.

  Attributes:
    x: Each layer's input.
    score: KVzip's.
  """

  x: Float[Any, "L R D"]
  score: Float[Any, "L R K"]

  @property
  def log_score(self) -> Float[Any, "L R K"]:
    """What is learned."""
    return np.maximum(np.log(np.maximum(self.score, 1e-30)), FLOOR)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noting:
  """A `hooks.KVCache` that keeps a text's inputs and scores, and no keys.

  Attributes:
    starts: Int32 [B], tokens of each text, which follows once more.
    x: [B, T, D], None before the text is read.
    score: [B, K, T], likewise.
    policy: Static.
    layer: Static.
  """

  starts: Any
  x: Any = None
  score: Any = None
  policy: kvzip.KVzip = dataclasses.field(
      default=kvzip.KVzip(), metadata={"static": True}
  )
  layer: int = dataclasses.field(default=0, metadata={"static": True})
  honours: ClassVar[tuple[str, ...]] = ("sinks", "keys")

  def reads_call(self) -> bool:
    """It does."""
    return True

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "Noting"]:
    """Attends to everything and takes notes."""
    new = tokens_lib.Tokens(query, key, value, positions, rotate, options)
    result, prompt = prompts.read(
        new, self.policy, layer=self.layer, capacity=1, is_raw=False
    )
    whole = dataclasses.replace(prompt, starts=self.starts)
    score, _, _ = calls.read_prompt(self.policy, whole)
    noted = dataclasses.replace(self, x=prompt.x, score=score)
    return result.out, noted


def see(
    model: models.Transformer,
    params: PyTree,
    texts: Int[np.ndarray, "B T"],
    request: tuple[int, ...],
    batch_size: int = 4,
) -> Seen:
  """Reads texts as KVzip does and returns what each layer saw of each token.

  Args:
    model: The Transformer.
    params: Its parameters.
    texts: Of one length, half of what the model reads at most.
    request: Tokens of KVzip's request.
    batch_size: Texts that are read side by side.

  Raises:
    UserError: Texts are too long to be read twice.
  """
  length, config = texts.shape[1], model.config
  whole = 2 * length + len(request)
  if whole > config.max_len:
    raise errors.UserError(
        f"texts of {length} tokens are read twice, {whole} tokens with the"
        f" request between; the model reads {config.max_len} at most."
    )
  require.memory(
      f"the inputs of {texts.size} tokens in {config.num_layers} layers",
      4 * texts.size * config.num_layers * config.embed_dim,
  )
  found = []
  for at in range(0, len(texts), batch_size):
    x, score = _see(
        model, params, jnp.asarray(texts[at : at + batch_size]), request
    )
    found.append((np.asarray(x), np.asarray(score)))
  x, score = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
  flat = lambda a: a.reshape(len(a), -1, a.shape[-1])
  assert x.shape[2] == length
  return Seen(flat(x), flat(score))


@functools.partial(jax.jit, static_argnames=("model", "request"))
def _see(
    model: models.Transformer,
    params: PyTree,
    texts: Int[Array, "B T"],
    request: tuple[int, ...],
) -> tuple[Float[Array, "L B T D"], Float[Array, "L B T K"]]:
  batch, length = texts.shape
  lengths = jnp.full((batch,), length, jnp.int32)
  rows, whole = rehearsal.repeat(texts, lengths, request)
  steps = jnp.arange(rows.shape[1])[None]
  caches = tuple(
      Noting(lengths, layer=layer) for layer in range(model.config.num_layers)
  )
  found: Any = model.apply(
      {"params": params},
      rows,
      positions=jnp.where(steps < whole[:, None], steps, -1),
      kv_cache=caches,
      logits_at=lengths - 1,
  )
  caches = found[1]
  x = jnp.stack([cache.x[:, :length] for cache in caches])
  score = jnp.stack([cache.score[..., :length] for cache in caches])
  return x, score.swapaxes(2, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How networks are fitted.

  Attributes:
    size: Hidden numbers of a layer's network.
    num_steps: Steps of AdamW.
    batch: Tokens of a step.
    lr: Highest learning rate; it falls to a tenth along a cosine.
    seed: Of the first values and the batches.
  """

  size: int = 64
  num_steps: int = 1000
  batch: int = 256
  lr: float = 3e-3
  seed: int = 0

  def __post_init__(self):
    for name in ("size", "num_steps", "batch"):
      require.at_least(name, getattr(self, name), 1)
    require.positive("lr", self.lr)


def fit(
    seen: Seen, settings: Settings
) -> tuple[kvzap.Network, Float[np.ndarray, "n"]]:
  """Returns the networks of all layers, and the mean loss of each step.

  Args:
    seen: Of the training texts.
    settings: How.

  Raises:
    UserError: Scores are not finite.
  """
  target = seen.log_score
  if not np.isfinite(target).all():
    raise errors.UserError(
        "scores of KVzip are not finite: the model's activations are not."
    )
  middle = seen.x.mean(axis=1, dtype=np.float32)
  spread = np.maximum(seen.x.std(axis=1, dtype=np.float32), 1e-6)
  arrays = seen.x, target, middle, spread
  networks, losses = _fit(settings, *map(jnp.asarray, arrays))
  inner = np.asarray(networks.inner) / spread[..., None]
  shift = np.einsum("LD,LDR->LR", middle, inner)
  networks = jax.tree.map(np.asarray, networks)
  networks = networks._replace(
      inner=inner, inner_bias=networks.inner_bias - shift
  )
  return networks, np.asarray(losses)


@functools.partial(jax.jit, static_argnames=("settings",))
def _fit(
    settings: Settings,
    x: Float[Array, "L R D"],
    target: Float[Array, "L R K"],
    middle: Float[Array, "L D"],
    spread: Float[Array, "L D"],
) -> tuple[kvzap.Network, Float[Array, "n"]]:
  """Networks of inputs of mean 0 and variance 1."""
  keys = jax.random.split(jax.random.key(settings.seed), 2)
  start = _start(keys[0], x.shape[2], settings.size, target)
  rate = optax.cosine_decay_schedule(settings.lr, settings.num_steps, alpha=0.1)
  optimizer = optax.adamw(rate, weight_decay=0.01)

  def loss(networks: kvzap.Network, rows: Int[Array, "b"]) -> Float[Array, ""]:
    inputs = (x[:, rows] - middle[:, None]) / spread[:, None]
    found = jax.vmap(kvzap.log_scores)(networks, inputs)
    return jnp.square(found - target[:, rows]).mean()

  def update(state: Any, step: Array) -> tuple[Any, Array]:
    networks, moments = state
    key = jax.random.fold_in(keys[1], step)
    rows = jax.random.randint(key, (settings.batch,), 0, x.shape[1])
    value, slopes = jax.value_and_grad(loss)(networks, rows)
    changes, moments = optimizer.update(slopes, moments, networks)
    return (optax.apply_updates(networks, changes), moments), value

  state = start, optimizer.init(start)
  steps = jnp.arange(settings.num_steps)
  (networks, _), losses = jax.lax.scan(update, state, steps)
  return networks, losses


def _start(
    key: Array, width: int, size: int, target: Float[Array, "L R K"]
) -> kvzap.Network:
  """Networks that say the mean of the targets, and little besides."""
  num_layers, _, num_kv_heads = target.shape
  draw = lambda key, n, m: jax.random.normal(key, (num_layers, n, m)) / n**0.5
  inner, outer = jax.random.split(key)
  return kvzap.Network(
      inner=draw(inner, width, size),
      inner_bias=jnp.zeros((num_layers, size)),
      outer=0.1 * draw(outer, size, num_kv_heads),
      outer_bias=target.mean(axis=1),
  )


def correlation(
    networks: kvzap.Network, seen: Seen
) -> Float[np.ndarray, "L K"]:
  """Of the networks' logarithms and KVzip's, over tokens, of each head."""
  found = jax.vmap(kvzap.log_scores)(
      jax.tree.map(jnp.asarray, networks), jnp.asarray(seen.x)
  )
  ours, theirs = np.asarray(found, np.float64), seen.log_score
  ours = ours - ours.mean(axis=1, keepdims=True)
  theirs = theirs - theirs.mean(axis=1, keepdims=True)
  both = np.sqrt((ours**2).sum(axis=1) * (theirs**2).sum(axis=1))
  return (ours * theirs).sum(axis=1) / np.maximum(both, 1e-30)
