"""A slot cache in plain Python: lists of tokens, one at a time, in float64.

Each policy's test file says its rule as a subclass of `Plain`; `check` compares
with the policy what is kept, and what comes out, at every step.

Letters: B sequences, T tokens, N query heads, K key and value heads, G = N / K,
H head size, C slots.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from joma.inference.cache import kv_cache
from joma.transformer import hooks
from tests.laws import given

CAPACITY = 12
_HEAD_DIM = 8
_LENGTHS = (5, 23, 30)
# Ten times the largest float32 error seen; values are of order 1.
_TOLERANCE = 2e-5
_OPTIONS = hooks.AttentionOptions(
    scale=_HEAD_DIM**-0.5, implementation="reference"
)


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


class Plain:
  """One sequence; `slots[head]` is a list of C tokens or None, each a dict.

  A token has pos, key, value and score; a rule adds what it needs.
  """

  def __init__(self, policy, capacity, num_kv_heads, scale, layer=0):
    self.policy = policy.with_capacity(capacity)
    self.capacity, self.scale, self.layer = capacity, scale, layer
    self.heads = range(num_kv_heads)
    self.slots = [[None] * capacity for _ in self.heads]
    self.queries, self.inputs = [], []

  def score_prompt(self, tokens, seen):
    """Scores the tokens of a prompt; `seen` is a `PromptSeen`."""

  def enter(self, token, head, position):
    """Gives a new token what it needs."""

  def priorities(self, tokens, position, head):
    """What each token is worth."""
    del position, head
    return [token["score"] for token in tokens]

  def leave(self, gone, stays, head, position):
    """Sees tokens of a head leave others."""

  def observe(self, kept, rows, position):
    """Scores the tokens of a head; `rows` are logits and weights, G each."""

  def observe_all(self, rows, position):
    """Scores all heads; `rows` are (head, logits, weights)."""
    for head in self.heads:
      kept = [s for s in self.slots[head] if s is not None]
      mine = [(logits, w) for h, logits, w in rows if h == head]
      self.observe(kept, mine, position)

  def visible(self, head):
    """Positions that a head keeps."""
    return sorted(s["pos"] for s in self.slots[head] if s is not None)

  def read(self, query, key, value):
    """query [T N H], key and value [T K H]: all of a prompt."""
    length = len(query)
    groups = query.shape[1] // len(self.heads)
    weights = np.zeros((query.shape[1], length, length))
    logits = np.zeros_like(weights)
    for n in range(query.shape[1]):
      for t in range(length):
        logits[n, t] = self.scale * key[:, n // groups] @ query[t, n]
        weights[n, t, : t + 1] = softmax(logits[n, t, : t + 1])
    self.queries = list(query)
    self.inputs = [x.ravel() for x in value]
    for head in self.heads:
      mine = slice(head * groups, (head + 1) * groups)
      tokens = [
          dict(pos=t, key=key[t, head], value=value[t, head], score=0.0)
          for t in range(length)
      ]
      seen = PromptSeen(weights[mine], weights, logits[mine], head, length)
      self.score_prompt(tokens, seen)
      ranks = self.ranks(tokens, length, head)
      # The greatest stay; of equal ones the newest.
      best = sorted(range(length), key=lambda t: (ranks[t], t))[::-1]
      kept = sorted(best[: self.capacity])
      gone = [token for t, token in enumerate(tokens) if t not in set(kept)]
      self.leave(gone, [tokens[t] for t in kept], head, length)
      for slot, t in enumerate(kept):
        self.slots[head][slot] = tokens[t]

  def step(self, query, key, value, position):
    """query [N H], key and value [K H]; returns out [N H]."""
    groups = len(query) // len(self.heads)
    self.queries.append(query)
    self.inputs.append(value.ravel())
    rows = []
    for head in self.heads:
      slots = self.slots[head]
      if None in slots:
        slot = slots.index(None)
      else:
        ranks = self.ranks(slots, position, head)
        slot = min(range(self.capacity), key=lambda c: ranks[c])
        stays = [token for c, token in enumerate(slots) if c != slot]
        self.leave([slots[slot]], stays, head, position)
      slots[slot] = dict(
          pos=position, key=key[head], value=value[head], score=0.0
      )
      self.enter(slots[slot], head, position)
    out = np.zeros_like(query)
    for head in self.heads:
      kept = [s for s in self.slots[head] if s is not None]
      for g in range(groups):
        n = head * groups + g
        logits = np.array([self.scale * query[n] @ s["key"] for s in kept])
        weights = softmax(logits)
        out[n] = sum(w * s["value"] for w, s in zip(weights, kept, strict=True))
        rows.append((head, logits, weights))
    self.observe_all(rows, position)
    return out

  def ranks(self, tokens, position, head):
    """Priorities, with inf for the first and the last tokens."""
    policy, ranks = self.policy, []
    priorities = self.priorities(tokens, position, head)
    for token, priority in zip(tokens, priorities, strict=True):
      is_sink = token["pos"] < policy.num_sinks
      is_recent = token["pos"] >= position - policy.num_recent
      ranks.append(math.inf if is_sink or is_recent else priority)
    return ranks


class PromptSeen:
  """What a prompt's queries gave: weights and logits [G, T, T] of a head."""

  def __init__(self, weights, of_all, logits, head, length):
    self.weights, self.of_all, self.logits = weights, of_all, logits
    self.head, self.length = head, length


def check(
    rule,
    policy,
    num_heads=4,
    num_kv_heads=2,
    num_steps=24,
    out_kernel=None,
    capacity=CAPACITY,
    init_layer=kv_cache.init_layer,
    shift=0.0,
):
  """Three prompts of different lengths, then a token a step for each.

  Args:
    rule: Subclass of `Plain`.
    policy: What it says in plain words.
    num_heads: N.
    num_kv_heads: K.
    num_steps: Decode steps.
    out_kernel: Of the layer [N, H, D]; None where nobody says.
    capacity: C.
    init_layer: Makes the cache.
    shift: Added to all keys, which changes no weight but how far from 0 they
      are.
  """
  query, key, value = _draw(num_heads, num_kv_heads, num_steps + max(_LENGTHS))
  arrays = query, key + np.float32(shift), value
  found = _run(policy, num_heads, capacity, init_layer, out_kernel, *arrays)
  start, outs, kept = map(np.asarray, found)
  query, key, value = (np.asarray(x, np.float64) for x in arrays)
  for b, length in enumerate(_LENGTHS):
    plain = rule(policy, capacity, num_kv_heads, _OPTIONS.scale)
    plain.read(query[b, :length], key[b, :length], value[b, :length])
    _same_kept(plain, start[b], "after the prompt")
    for i in range(num_steps):
      at = length + i
      out = plain.step(query[b, at], key[b, at], value[b, at], at)
      _same_kept(plain, kept[i, b], f"sequence {b}, step {i}")
      np.testing.assert_allclose(outs[i, b], out, atol=_TOLERANCE)


def _draw(num_heads, num_kv_heads, num_steps):
  """Keys share a direction, so that cosines are not all nought."""
  draws = np.random.default_rng(num_heads)
  normal = lambda *shape: draws.standard_normal(shape, np.float32)
  shape = lambda heads: (3, num_steps, heads, _HEAD_DIM)
  query, key, value = (
      normal(*shape(heads)) for heads in (num_heads, num_kv_heads, num_kv_heads)
  )
  key += normal(num_kv_heads, _HEAD_DIM)
  return jax.device_put((2 * query, key, value))


@functools.partial(
    jax.jit, static_argnames=("policy", "num_heads", "capacity", "init_layer")
)
def _run(
    policy, num_heads, capacity, init_layer, out_kernel, query, key, value
):
  """Positions after the prompts; outputs and positions of each step."""
  cache = init_layer(
      policy.with_capacity(capacity),
      0,
      (3, key.shape[2], capacity, _HEAD_DIM),
      num_heads // key.shape[2],
      jnp.float32,
  )
  plain = lambda x, positions: x
  options = dataclasses.replace(_OPTIONS, out_kernel=out_kernel)
  longest, lengths = max(_LENGTHS), jnp.array(_LENGTHS)
  steps = jnp.arange(longest)[None]
  prompt_positions = jnp.where(steps < lengths[:, None], steps, -1)
  first = [x[:, :longest] for x in (query, key, value)]
  options = given.with_call(options, first[2], prompt_positions)
  _, cache = cache.attend(*first, prompt_positions, plain, options)

  def step(cache, i):
    at = lengths + i
    pick = lambda x: jnp.take_along_axis(x, at[:, None, None, None], axis=1)
    one = [pick(x) for x in (query, key, value)]
    told = given.with_call(options, one[2], at[:, None])
    out, cache = cache.attend(*one, at[:, None], plain, told)
    return cache, (out[:, 0], cache.kept_positions())

  start = cache.kept_positions()
  num_steps = query.shape[1] - longest
  _, (outs, kept) = jax.lax.scan(step, cache, jnp.arange(num_steps))
  return start, outs, kept


def _same_kept(plain, pos, where):
  for head in plain.heads:
    found = sorted(int(p) for p in pos[head] if p >= 0)
    assert found == plain.visible(head), (where, head, found)
