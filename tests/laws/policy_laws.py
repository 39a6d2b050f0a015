"""What every cache policy holds to, whatever it ranks tokens by.

Each law takes a policy and raises AssertionError where it is broken. They are
checked on one layer, whose prompts are ragged and whose steps go on to three
times as many tokens as there are slots.

Letters: B sequences, N query heads, K key and value heads, H head size, C
slots.
"""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import hooks
from joma.transformer.rope import rotary
from tests.laws import given

# Slots of a head, and slots that hold all of the longest text.
FEW, ALL = 8, 32
LENGTHS, STEPS = (5, 11, 1), 20
CONFIG = configs.TransformerConfig(
    vocab_size=5,
    num_layers=1,
    embed_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=8,
    max_len=64,
)
_OPTIONS = hooks.AttentionOptions(scale=0.4, implementation="reference")


class Seen(NamedTuple):
  """What reading three texts showed.

  Attributes:
    prompt: Outputs at the prompts' tokens [B, T, N, H], 0 at padding.
    steps: Outputs of the steps [S, B, 1, N, H].
    kept: Positions kept after the prompts and after each step [S + 1, B, K, C],
      -1 elsewhere; None where nothing leaves.
    cache: After all.
  """

  prompt: Any
  steps: Any
  kept: Any
  cache: Any


def full_capacity_is_full_attention(policy):
  """With a slot for every token: the bits of a cache that keeps everything."""
  (full,) = full_cache.init(CONFIG, len(LENGTHS), ALL)
  want, got = run(full, draw()), read(policy, ALL)
  chex.assert_trees_all_equal(got.prompt, want.prompt)
  chex.assert_trees_all_equal(got.steps, want.steps)


def sequences_do_not_know_of_each_other(policy):
  """In another place and beside other texts a text is read bit for bit."""
  together = read(policy, FEW)
  # The second stands where the third was, between two others.
  order, other = np.array([2, 0, 1]), draw(seed=1)
  arrays = [
      jnp.where((jnp.arange(3) == 2)[:, None, None, None], x[order], y)
      for x, y in zip(draw(), other, strict=True)
  ]
  moved = run(init(policy, FEW), arrays, (9, 2, LENGTHS[1]))
  row = lambda x, at: None if x is None else x[:, at]
  chex.assert_trees_all_equal(moved.prompt[2], together.prompt[1])
  chex.assert_trees_all_equal(row(moved.steps, 2), row(together.steps, 1))
  if together.kept is not None:
    chex.assert_trees_all_equal(
        np.sort(row(moved.kept, 2)), np.sort(row(together.kept, 1))
    )


def only_own_tokens_are_kept_each_once(policy):
  """No padding, none that is still to come, no more than there is room for."""
  seen = read(policy, FEW)
  if seen.kept is None:
    return
  slots = ALL if _keeps_all(policy) else FEW
  for step, kept in enumerate(np.asarray(seen.kept)):
    for heads, length in zip(kept, LENGTHS, strict=True):
      found = [[int(p) for p in head if p >= 0] for head in heads]
      for head in found:
        assert len(set(head)) == len(head), (step, head)
        assert not set(head) - set(range(length + step)), (step, head)
      room = min(slots, length + step) * len(heads)
      assert sum(map(len, found)) <= room, (step, found)
      if step:
        # The newest one has just been written.
        assert all(length + step - 1 in head for head in found), (step, found)


def what_is_protected_stays(policy):
  """The first tokens, and the last ones before the new one."""
  seen, sized = read(policy, FEW), _sized(policy, FEW)
  if seen.kept is None:
    return
  for step, kept in enumerate(np.asarray(seen.kept)):
    for heads, length in zip(kept, LENGTHS, strict=True):
      newest = length + step - 1
      recent = range(max(newest - (sized.num_recent or 0), 0), newest)
      wanted = {*range(min(sized.num_sinks, newest)), *recent}
      if not step:
        wanted = {t for t in wanted if t > newest - (sized.num_recent or 0)}
      for head in heads:
        assert wanted <= set(map(int, head)), (step, wanted, head)


def a_step_is_one_trace(policy):
  """Prompts and steps give back what they took, so one program serves all."""
  cache, arrays = init(policy, FEW), draw()
  for length in (7, 1):
    span = [x[:, :length] for x in arrays]
    positions = jnp.broadcast_to(jnp.arange(length)[None], (3, length))
    _, after = jax.eval_shape(
        lambda cache, *args: cache.attend(
            *args, _plain, given.with_call(_OPTIONS, args[2], args[3])
        ),
        cache,
        *span,
        positions,
    )
    before = jax.eval_shape(lambda cache: cache, cache)
    assert jax.tree.map(_type, before) == jax.tree.map(_type, after)


def _type(x):
  return x.shape, x.dtype, x.weak_type


def a_sequence_without_a_token_keeps_all_it_had(policy):
  """Position -1 is nobody's: who pauses goes on as if nothing had been."""
  pauses = np.arange(STEPS)[:, None] // 3 == np.array([[-1, 2, -1]])
  cache, arrays = init(policy, FEW), draw()
  paused = run(cache, arrays, is_active=jnp.asarray(~pauses))
  whole = read(policy, FEW)
  chex.assert_trees_all_equal(
      paused.steps[~pauses[:, 1], 1], whole.steps[:-3, 1]
  )
  chex.assert_trees_all_equal(paused.steps[:, 0], whole.steps[:, 0])


def more_prompts_are_their_tokens_one_by_one(policy, **options):
  """What goes on is read at once, and nobody can tell."""
  turn = rotate if options else _plain
  cache, arrays = init(policy, FEW, **options), draw()
  # In two turns; a text may have nothing to say in one.
  is_active = np.arange(STEPS)[:, None] % 10 < np.array([[4, 9, 7]])
  is_active[10:, 1] = False
  one_by_one = run(cache, arrays, is_active=is_active, rotate=turn)
  at_once = _converse(cache, arrays, jnp.array(LENGTHS), is_active, turn)
  if isinstance(policy, _ROUNDS):
    _assert_same_cache(at_once[1], one_by_one.cache)
  else:
    chex.assert_trees_all_equal(at_once[1], one_by_one.cache)
  active = lambda outs: np.asarray(outs)[:, :, 0][is_active]
  chex.assert_trees_all_close(
      active(at_once[0]), active(one_by_one.steps), atol=1e-6
  )


# Its sums over tokens come in another order where a prompt is read at once.
_ROUNDS = names.load("expected_attention")


def _assert_same_cache(cache, other):
  """Slots hold the same tokens exactly; sums of a policy's own may round."""
  sums = ("score", "aux", "state")
  fields = {field.name: getattr(cache, field.name) for field in _fields(cache)}
  others = {field.name: getattr(other, field.name) for field in _fields(other)}
  for name, leaves in fields.items():
    if name in sums:
      chex.assert_trees_all_close(leaves, others[name], rtol=1e-6, atol=1e-6)
    else:
      chex.assert_trees_all_equal(leaves, others[name])


def _fields(cache):
  return [f for f in dataclasses.fields(cache) if not f.metadata.get("static")]


def no_method_that_does_something_is_replaced(policy):
  """A base class's method is to be given, or final; it is never overridden."""
  for kind in type(policy).__mro__:
    for base in kind.__mro__[1:]:
      if base is object:
        continue
      methods = {n for n, x in vars(base).items() if _is_method(x)}
      methods = {n for n in methods if not n.startswith("__")}
      assert not methods & set(vars(kind)), (kind, base, methods)


LAWS = (
    full_capacity_is_full_attention,
    sequences_do_not_know_of_each_other,
    only_own_tokens_are_kept_each_once,
    what_is_protected_stays,
    a_step_is_one_trace,
    a_sequence_without_a_token_keeps_all_it_had,
    more_prompts_are_their_tokens_one_by_one,
    no_method_that_does_something_is_replaced,
)


def _plain(x, positions):
  return x


def rotate(x, positions):
  """Rotary positions."""
  return rotary.rotate_by(x, positions, CONFIG.rope_of(0), CONFIG)


@functools.cache
def read(policy, capacity) -> Seen:
  """Reads the three texts; once for all laws of a policy."""
  return run(init(policy, capacity), draw())


def init(policy, capacity, **options):
  """An empty cache; those that keep everything have room for it."""
  policy = calls.fitted(policy, capacity)
  room = ALL if _keeps_all(policy) else capacity
  return kv_cache.init(policy, CONFIG, len(LENGTHS), room, **options)[0]


def draw(seed=0):
  """Queries, keys and values; keys share a direction."""
  draws = np.random.default_rng(seed)
  normal = lambda *shape: draws.standard_normal(shape, np.float32)
  query, key, value = (normal(3, ALL, heads, 8) for heads in (4, 2, 2))
  return jax.device_put((query, key + normal(8), value))


def run(cache, arrays, lengths=LENGTHS, is_active=None, rotate=_plain) -> Seen:
  """Reads prompts of three lengths, then a token a step.

  Args:
    cache: Empty.
    arrays: As `draw` gives them.
    lengths: Of the prompts, up to the longest of `LENGTHS`.
    is_active: Who has a token at each step [S, B]; None is all.
    rotate: Of queries and keys.
  """
  if is_active is None:
    is_active = jnp.ones((STEPS, len(lengths)), bool)
  return _run(cache, arrays, jnp.array(lengths), jnp.asarray(is_active), rotate)


@functools.partial(jax.jit, static_argnames="rotate")
def _run(cache, arrays, lengths, is_active, rotate):
  steps = jnp.arange(max(LENGTHS))[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = [x[:, : steps.shape[1]] for x in arrays]
  options = given.with_call(_OPTIONS, first[2], positions)
  out, cache = cache.attend(*first, positions, rotate, options)
  prompt = jnp.where((positions >= 0)[..., None, None], out, 0)

  def step(carry, is_active):
    cache, at = carry
    pick = lambda x: jnp.take_along_axis(x, at[:, None, None, None], axis=1)
    positions = jnp.where(is_active, at, -1)[:, None]
    one = [pick(x) for x in arrays]
    options = given.with_call(_OPTIONS, one[2], positions)
    out, cache = cache.attend(*one, positions, rotate, options)
    return (cache, at + is_active), (out, cache.kept_positions())

  start = cache.kept_positions()
  (cache, _), (outs, kept) = jax.lax.scan(step, (cache, lengths), is_active)
  if start is not None:
    kept = jnp.concatenate([start[None], kept])
  return Seen(prompt, outs, kept, cache)


@functools.partial(jax.jit, static_argnames="rotate")
def _converse(cache, arrays, lengths, is_active, rotate):
  """A prompt, then what is active of ten steps as a prompt, then of ten."""
  steps = jnp.arange(max(LENGTHS))[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = [x[:, : steps.shape[1]] for x in arrays]
  options = given.with_call(_OPTIONS, first[2], positions)
  _, cache = cache.attend(*first, positions, rotate, options)
  outs, at = [], lengths
  for turn in (is_active[:10].T, is_active[10:].T):
    place = at[:, None] + jnp.cumsum(turn, axis=1) - 1
    pick = lambda x, at=place: jnp.take_along_axis(
        x, at[..., None, None], axis=1
    )
    positions = jnp.where(turn, place, -1)
    span = [pick(x) for x in arrays]
    options = given.with_call(_OPTIONS, span[2], positions)
    out, cache = cache.attend(*span, positions, rotate, options)
    outs.append(out.swapaxes(0, 1)[:, :, None])
    at = at + turn.sum(axis=1)
  return jnp.concatenate(outs), cache


def _keeps_all(policy):
  return policy.reads_part or not policy.evicts


def _sized(policy, capacity) -> policy_lib.Policy:
  return calls.fitted(policy, capacity).with_capacity(capacity)


def _is_method(x):
  return inspect.isfunction(x) and not getattr(x, "__isabstractmethod__", False)
