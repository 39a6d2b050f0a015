"""Recordings that nothing measures: attention of sharp, near and flat heads."""

import numpy as np

from joma.inference.explore import recording

# Spaces, line ends, what HTML would take for its own, several bytes.
_WORDS = (
    *(" the", " sink", "\n", " naïve", " 東京", " <b>&amp;", "</script>"),
    *(" @@header@@", '"', "", " token"),
)


def make(
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    num_tokens=40,
    num_entries=None,
    policies=("h2o", "snapkv"),
    seed=0,
    num_distinct=None,
):
  """Returns a recording of random attention, and its maps [L, N, T, T].

  Maps are None where a query has more keys than entries: they are large. With
  `num_distinct` maps come again, for large ones take long to draw.
  """
  rng = np.random.default_rng(seed)
  size = min(num_entries or num_tokens, num_tokens)
  shape = (num_layers, num_heads, num_tokens)
  left_at = [
      _left_at(rng, (num_layers, num_kv_heads, num_tokens)) for _ in policies
  ]
  keys = np.zeros((*shape, size), np.uint16)
  weights = np.zeros((*shape, size), np.float32)
  received, shares = np.zeros(shape), np.zeros((len(policies), *shape))
  entropy, maps, drawn = np.zeros(shape[:2]), [], []
  queries = np.arange(num_tokens)[:, None]
  for at in np.ndindex(shape[:2]):
    if num_distinct is None or len(drawn) < num_distinct:
      drawn.append(_map(rng, num_tokens))
    one = drawn[(at[0] * num_heads + at[1]) % len(drawn)]
    found = np.argpartition(-one, size - 1, axis=1)[:, :size]
    order = np.argsort(-np.take_along_axis(one, found, 1), 1, kind="stable")
    keys[at] = np.take_along_axis(found, order, 1)
    weights[at] = np.take_along_axis(one, keys[at].astype(int), 1)
    received[at] = one.sum(axis=0)
    entropy[at] = -(one * np.log(np.maximum(one, 1e-30))).sum(1).mean()
    head = at[1] * num_kv_heads // num_heads
    for policy, left in enumerate(left_at):
      is_kept = left[at[0], head][None] > queries
      shares[(policy, *at)] = (one * is_kept).sum(axis=1)
    if size == num_tokens:
      maps.append(one)
  attention = recording.Attention(
      keys=keys,
      weights=weights,
      totals=np.ones(shape, np.float32),
      received=received,
      shares=shares,
      entropy=entropy,
      sink_mass=rng.uniform(size=shape[:2]),
      induction=rng.uniform(size=shape[:2]),
  )
  found = recording.Recording(
      model="synthetic",
      pieces=tuple(_WORDS[i] for i in rng.integers(len(_WORDS), size=shape[2])),
      num_prompt=num_tokens * 3 // 4,
      reading="tokens",
      attention=attention,
      losses=_losses(rng, num_tokens),
      policies=tuple(
          recording.Evictions(
              name, name.upper(), num_tokens // 4, left, _losses(rng, shape[2])
          )
          for name, left in zip(policies, left_at, strict=True)
      ),
  )
  return found, np.reshape(maps, (*shape, num_tokens)) if maps else None


def _left_at(rng, shape):
  """Tokens stay for a while; the first one to the end."""
  num_tokens = shape[-1]
  left_at = rng.integers(1, num_tokens + 1, shape)
  left_at = np.maximum(left_at, np.arange(num_tokens) + 1 + num_tokens // 8)
  left_at[left_at > num_tokens] = num_tokens
  left_at[..., 0] = num_tokens
  return left_at


def _map(rng, num_tokens):
  logits = rng.uniform(0.5, 4) * rng.normal(size=(num_tokens,) * 2)
  logits[:, 0] += rng.uniform(0, 8)
  back = np.arange(num_tokens)[:, None] - np.arange(num_tokens)
  logits = logits.astype(np.float32) - rng.choice([0, 0.01, 0.3]) * back
  logits = np.where(back >= 0, logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _losses(rng, num_tokens):
  losses = rng.exponential(2, num_tokens)
  losses[-1] = np.nan
  return losses
