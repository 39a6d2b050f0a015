"""The programs of decoding: prompts, pieces of prompts, and single tokens.

Each is compiled once for all texts of a padded length; caches have a fixed
capacity and are donated from step to step.

Letters: B batch, T prompt tokens after padding, P tokens of a piece, V
vocabulary.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.inference import sampling
from joma.inference import sampling_config
from joma.inference.cache import storage
from joma.transformer import model as models

GREEDY = sampling_config.GREEDY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Between two decode steps.

  Attributes:
    tokens: Newest token of each sequence, int32 [B].
    positions: Where it stands, int32 [B].
    is_done: Whether the sequence has ended, bool [B].
    num_new: Tokens generated so far, of the longest, int32.
    is_finite: Whether the logits of the newest token were numbers, bool [B].
    kv_cache: A cache a layer, of all that comes before the newest token.
  """

  tokens: storage.Leaf
  positions: storage.Leaf
  is_done: storage.Leaf
  num_new: storage.Leaf
  is_finite: storage.Leaf
  kv_cache: PyTree


def state_of(
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
    kv_cache: PyTree,
    eos_ids: tuple[int, ...] = (),
    is_finite: Bool[Array, "B"] | None = None,
) -> DecodeState:
  """Returns the state in which each sequence has its first new token.

  Args:
    tokens: The first new ones.
    positions: Where they stand.
    kv_cache: Of what comes before them.
    eos_ids: Tokens that end a sequence.
    is_finite: Whether the tokens' logits were numbers; None is yes.
  """
  if is_finite is None:
    is_finite = jnp.ones(tokens.shape, bool)
  is_done = is_eos(tokens, eos_ids)
  return DecodeState(
      tokens, positions, is_done, jnp.int32(1), is_finite, kv_cache
  )


@functools.partial(jax.jit, static_argnames=("model", "sampler", "eos_ids"))
def prefill(
    model: models.Transformer,
    params: PyTree,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    kv_cache: PyTree,
    sampler: sampling_config.SamplingConfig = GREEDY,
    eos_ids: tuple[int, ...] = (),
    starts: Int[Array, "B"] | None = None,
) -> DecodeState:
  """Reads prompts of any length up to T and draws their next tokens.

  Args:
    model: Static.
    params: Of the model.
    prompts: Padded at their ends.
    lengths: Tokens of each prompt, at least 1.
    kv_cache: Of the tokens before the prompts; one that keeps everything must
      have room.
    sampler: How tokens are chosen.
    eos_ids: Tokens that end a sequence.
    starts: Positions of the prompts' first tokens; None is 0.
  """
  starts = jnp.zeros_like(lengths) if starts is None else starts
  steps = jnp.arange(prompts.shape[1])[None]
  positions = jnp.where(steps < lengths[:, None], starts[:, None] + steps, -1)
  logits, kv_cache = model.apply(
      {"params": params},
      prompts,
      positions=positions,
      kv_cache=kv_cache,
      logits_at=lengths - 1,
  )
  tokens = sampling.sample(logits[:, 0], sampler)
  is_finite = are_finite(logits[:, 0], tokens)
  return state_of(tokens, starts + lengths, kv_cache, eos_ids, is_finite)


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="kv_cache",
)
def read_piece(
    model: models.Transformer,
    params: PyTree,
    piece: Int[Array, "B P"],
    place: Int[Array, ""] | np.int32,
    lengths: Int[Array, "B"],
    starts: Int[Array, "B"],
    found: tuple[Int[Array, "B"], Bool[Array, "B"]],
    kv_cache: PyTree,
    sampler: sampling_config.SamplingConfig = GREEDY,
    eos_ids: tuple[int, ...] = (),
) -> DecodeState:
  """Reads a piece of prompts; draws where a prompt ends in it.

  Args:
    model: Static.
    params: Of the model.
    piece: Tokens of the prompts from `place` on.
    place: How many tokens of each prompt come before.
    lengths: Of whole prompts.
    starts: Positions of their first tokens.
    found: Tokens drawn by earlier pieces, and whether of finite logits.
    kv_cache: Of all that comes before the piece; donated.
    sampler: How tokens are chosen.
    eos_ids: Tokens that end a sequence.
  """
  size = piece.shape[1]
  steps = place + jnp.arange(size)[None]
  positions = jnp.where(steps < lengths[:, None], starts[:, None] + steps, -1)
  ends = lengths - 1 - place
  logits, kv_cache = model.apply(
      {"params": params},
      piece,
      positions=positions,
      kv_cache=kv_cache,
      logits_at=jnp.clip(ends, 0, size - 1),
  )
  drawn = sampling.sample(logits[:, 0], sampler)
  is_end = (ends >= 0) & (ends < size)
  tokens = jnp.where(is_end, drawn, found[0])
  is_finite = jnp.where(is_end, are_finite(logits[:, 0], drawn), found[1])
  return state_of(tokens, starts + lengths, kv_cache, eos_ids, is_finite)


def _decode(
    model: models.Transformer,
    params: PyTree,
    state: DecodeState,
    sampler: sampling_config.SamplingConfig = GREEDY,
    eos_ids: tuple[int, ...] = (),
) -> DecodeState:
  """Takes in the newest tokens and draws the next ones.

  A sequence that has ended takes in nothing and repeats its last token. The
  state is donated.
  """
  positions = jnp.where(state.is_done, -1, state.positions)
  logits, kv_cache = model.apply(
      {"params": params},
      state.tokens[:, None],
      positions=positions[:, None],
      kv_cache=state.kv_cache,
  )
  tokens = sampling.sample(logits[:, 0], sampler, state.num_new)
  tokens = jnp.where(state.is_done, state.tokens, tokens)
  return DecodeState(
      tokens=tokens,
      positions=state.positions + ~state.is_done,
      is_done=state.is_done | is_eos(tokens, eos_ids),
      num_new=state.num_new + 1,
      is_finite=state.is_done | are_finite(logits[:, 0], tokens),
      kv_cache=kv_cache,
  )


decode_step = functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="state",
)(_decode)


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="kv_cache",
)
def advance(
    model: models.Transformer,
    params: PyTree,
    state: DecodeState,
    kv_cache: PyTree,
    sampler: sampling_config.SamplingConfig = GREEDY,
    eos_ids: tuple[int, ...] = (),
) -> DecodeState:
  """As `decode_step`, but donates the caches alone, which are apart.

  What a step has drawn can then be read while the next one runs.
  """
  state = dataclasses.replace(state, kv_cache=kv_cache)
  return _decode(model, params, state, sampler, eos_ids)


def check_follows(
    model: models.Transformer, batch_size: int, init: Callable[[], PyTree]
) -> None:
  """Raises UserError if a cache would pass over one of the model's systems.

  A token is traced; neither parameters nor caches are made.

  Args:
    model: The model.
    batch_size: B, of the caches.
    init: Makes a cache a layer.
  """
  if not model.config.attention:
    return
  token = jnp.zeros((batch_size, 1), jnp.int32)
  jax.eval_shape(lambda: model.init(jax.random.key(0), token, kv_cache=init()))


def are_finite(
    logits: Float[Array, "B V"], tokens: Int[Array, "B"]
) -> Bool[Array, "B"]:
  """Whether tokens were drawn from numbers.

  A NaN counts as the largest logit wherever one is drawn, by argmax as by
  Gumbel noise, so that it is enough to look at the logit of the token.
  """
  drawn = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
  return jnp.isfinite(drawn[:, 0])


def is_eos(tokens: Int[Array, "..."], eos_ids: tuple[int, ...]) -> Array:
  """Whether a token ends its sequence."""
  found = jnp.zeros(tokens.shape, bool)
  for eos in eos_ids:
    found = found | (tokens == eos)
  return found
