"""KV-cache policies in plain Python: lists of tokens, one at a time, float64.

One sequence; `slots[head]` is a list of C tokens or None, each a dict.
"""

import math

import jax
import numpy as np

from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.by_attention import h2o


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


class Oracle:
  """Reads a prompt, then tokens; `visible[head]` are the positions kept."""

  def __init__(self, policy, capacity, num_kv_heads, scale, layer=0):
    self.policy = policy.with_capacity(capacity)
    self.name = type(policy).__name__
    self.capacity, self.scale, self.layer = capacity, scale, layer
    self.heads = range(num_kv_heads)
    self.slots = [[None] * capacity for _ in self.heads]
    self.queries = []
    self.rotate = lambda x, position: x

  def visible(self, head):
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
    for head in self.heads:
      mine = slice(head * groups, (head + 1) * groups)
      tokens = [
          dict(pos=t, key=key[t, head], value=value[t, head], score=0.0)
          for t in range(length)
      ]
      self._score_prompt(
          tokens, weights[mine], weights, logits[mine], head, length
      )
      ranks = self._ranks(tokens, length, head)
      # The greatest stay; of equal ones the newest.
      best = sorted(range(length), key=lambda t: (ranks[t], t))[::-1]
      kept = sorted(best[: self.capacity])
      for slot, t in enumerate(kept):
        self.slots[head][slot] = tokens[t]

  def step(self, query, key, value, position):
    """query [N H], key and value [K H]; returns out [N H]."""
    groups = len(query) // len(self.heads)
    self.queries.append(query)
    rows = []
    for head in self.heads:
      slots = self.slots[head]
      if None in slots:
        slot = slots.index(None)
      else:
        ranks = self._ranks(slots, position, head)
        slot = min(range(self.capacity), key=lambda c: ranks[c])
      slots[slot] = dict(
          pos=position, key=key[head], value=value[head], score=0.0
      )
      self._enter(slots[slot], head, position)
    out = np.zeros_like(query)
    for head in self.heads:
      kept = [s for s in self.slots[head] if s is not None]
      for g in range(groups):
        n = head * groups + g
        logits = np.array([self.scale * query[n] @ s["key"] for s in kept])
        weights = softmax(logits)
        out[n] = sum(w * s["value"] for w, s in zip(weights, kept, strict=True))
        rows.append((head, logits, weights))
    self._observe(rows, position)
    return out

  def _ranks(self, tokens, position, head):
    policy = self.policy
    priorities = self._priorities(tokens, position, head)
    ranks = []
    for token, priority in zip(tokens, priorities, strict=True):
      pos = token["pos"]
      is_sink = pos < policy.num_sinks
      is_recent = pos >= position - policy.num_recent
      ranks.append(math.inf if is_sink or is_recent else priority)
    return ranks

  def _score_prompt(self, tokens, mine, everyone, logits, head, length):
    policy, name = self.policy, self.name
    for t, token in enumerate(tokens):
      column = mine[:, :, t]  # [G, T]
      if name == "H2O":
        decay = policy.decay if policy.score == "ema" else 1.0
        aged = sum(
            column[:, i] * decay ** (length - 1 - i) for i in range(length)
        )
        token["score"] = aged.sum() if policy.reduce == "sum" else aged.max()
      elif name == "Scissorhands":
        token["history"] = [
            column[:, i].mean() > 1 / (i + 1)
            for i in range(max(length - policy.history, 0), length)
        ]
      elif name == "TOVA":
        token["score"] = everyone[:, -1, t].mean()
      elif name in ("SnapKV", "PyramidKV"):
        first = length - policy.window
        around = policy.kernel_size // 2
        near = [
            mine[:, max(first, 0) :, u].mean()
            for u in range(t - around, t + around + 1)
            if 0 <= u < first
        ]
        token["score"] = sum(near) / policy.kernel_size
      elif name == "RKV":
        token["score"] = column[:, max(length - policy.window, 0) :].mean()
      elif name == "Keyformer":
        token["noise"] = self._noise(head, t)
    if name == "Keyformer":
      for g in range(len(mine)):
        for i in range(length):
          noisy = np.array(
              [logits[g, i, t] + tokens[t]["noise"] for t in range(i + 1)]
          )
          for t, w in enumerate(softmax(noisy / policy.tau_start)):
            tokens[t]["score"] += w
    if name == "Knorm":
      for token in tokens:
        token["score"] = -np.linalg.norm(token["key"])
    if name == "LagKV":
      for token in tokens:
        token["score"] = 1.0
      end = policy.num_sinks + 2 * policy.lag_size
      while end <= length:
        self._score_chunk(tokens, end)
        end += policy.lag_size
    if name == "ExpectedAttention":
      for token in tokens:
        self._expect(token, head, length)

  def _enter(self, token, head, position):
    if self.name == "Scissorhands":
      token["history"] = []
    elif self.name == "Keyformer":
      token["noise"] = self._noise(head, position)
    elif self.name == "Knorm":
      token["score"] = -np.linalg.norm(token["key"])
    elif self.name == "LagKV":
      token["score"] = 1.0
    elif self.name == "ExpectedAttention":
      self._expect(token, head, position + 1)

  def _priorities(self, tokens, position, head):
    policy, name = self.policy, self.name
    if name in ("Window", "StreamingLLM"):
      return [s["pos"] for s in tokens]
    if name == "Random":
      draws = jax.random.uniform(
          policy_lib.random_key(policy.seed, self.layer, position),
          (len(tokens), len(self.heads)),
      )
      return [float(x) for x in draws[:, head]]
    if name == "H2O" and policy.score == "mean":
      return [s["score"] / max(position - s["pos"], 1) for s in tokens]
    if name == "Scissorhands":
      return [sum(s["history"][-policy.history :]) for s in tokens]
    if name in ("KeyDiff", "RKV"):
      unit = [s["key"] / np.linalg.norm(s["key"]) for s in tokens]
      mean = np.mean(unit, axis=0)
      cosine = np.array([u @ mean / np.linalg.norm(mean) for u in unit])
      if name == "KeyDiff":
        return list(-cosine)
      attention = np.array([s["score"] for s in tokens])
      wanted = attention / attention.sum()
      return list(policy.mix * wanted - (1 - policy.mix) * softmax(cosine))
    if name == "ExpectedAttention":
      judged = [s for s in tokens if s["pos"] >= policy.num_sinks]
      expected = sum(
          softmax(np.array([s["expected"][g] for s in judged]))
          for g in range(len(judged[0]["expected"]))
      ) / len(judged[0]["expected"])
      by_pos = {
          s["pos"]: e * np.linalg.norm(s["value"])
          for s, e in zip(judged, expected, strict=True)
      }
      return [by_pos.get(s["pos"], 0.0) for s in tokens]
    return [s["score"] for s in tokens]

  def _observe(self, rows, position):
    policy, name = self.policy, self.name
    if name == "TOVA":
      for index in range(self.capacity):
        alive = [s[index] for s in self.slots if s[index] is not None]
        if alive:
          # All heads hold the same tokens in the same slots.
          order = sum(s is not None for s in self.slots[0][:index])
          mean = np.mean([weights[order] for _, _, weights in rows])
          for token in alive:
            token["score"] = mean
      return
    for head in self.heads:
      kept = [s for s in self.slots[head] if s is not None]
      mine = [(lo, w) for h, lo, w in rows if h == head]
      for i, token in enumerate(kept):
        given = np.array([w[i] for _, w in mine])
        if name == "H2O":
          decay = policy.decay if policy.score == "ema" else 1.0
          joined = given.sum() if policy.reduce == "sum" else given.max()
          token["score"] = decay * token["score"] + joined
        elif name == "Scissorhands":
          token["history"].append(given.mean() > 1 / len(kept))
        elif name in ("SnapKV", "PyramidKV", "RKV"):
          token["score"] += (given.mean() - token["score"]) / policy.window
        elif name == "Keyformer":
          done = min(position / policy.num_steps, 1)
          tau = policy.tau_start + (policy.tau_end - policy.tau_start) * done
          noise = np.array([s["noise"] for s in kept])
          token["score"] += sum(
              softmax((lo + noise) / tau)[i] for lo, _ in mine
          )
      if name == "LagKV":
        end = position + 1
        past = end - policy.num_sinks
        if past % policy.lag_size == 0 and past >= 2 * policy.lag_size:
          self._score_chunk(kept, end)

  def _score_chunk(self, tokens, end):
    size = self.policy.lag_size
    later = [s for s in tokens if end - size <= s["pos"] < end]
    chunk = [s for s in tokens if end - 2 * size <= s["pos"] < end - size]
    if not chunk:
      return
    both = np.zeros(len(chunk))
    for kind in ("key", "value"):
      low = np.min([s[kind] for s in later], axis=0)
      high = np.max([s[kind] for s in later], axis=0)
      extent = np.where(high > low, high - low, 1.0)
      deviation = [np.std((s[kind] - low) / extent, ddof=1) for s in chunk]
      both += softmax(np.array(deviation)) / 2
    for rank, i in enumerate(np.argsort(both)):
      chunk[i]["score"] = rank / size

  def _noise(self, head, position):
    key = policy_lib.random_key(self.policy.seed, self.layer, position)
    return float(jax.random.gumbel(key, (len(self.heads),))[head])

  def _expect(self, token, head, start):
    policy = self.policy
    seen = np.array(self.queries[policy.num_sinks :])
    groups = len(self.queries[0]) // len(self.heads)
    size = len(token["key"])
    turn = np.mean(
        [
            [self.rotate(row, start + n) for row in np.eye(size)]
            for n in range(policy.num_future)
        ],
        axis=0,
    ).T
    token["expected"] = []
    for n in range(head * groups, (head + 1) * groups):
      if len(seen):
        mean = seen[:, n].mean(axis=0)
        centred = seen[:, n] - mean
        covariance = centred.T @ centred / len(seen)
      else:
        mean, covariance = np.zeros(size), np.zeros((size, size))
      key, turned = token["key"], turn @ mean
      token["expected"].append(
          self.scale * key @ turned
          + self.scale**2 / 2 * key @ turn @ covariance @ turn.T @ key
      )


def every_policy():
  """One of each, with sizes that a capacity of 12 shows at work."""
  known = policy_names.all_policies()
  return {
      "window": known["window"](),
      "streaming_llm": known["streaming_llm"](num_sinks=3),
      "random": known["random"](seed=3),
      "h2o_sum": h2o.H2O(),
      "h2o_sinks": h2o.H2O(num_sinks=2, num_recent=3),
      "h2o_mean": h2o.H2O(score="mean", num_recent=2),
      "h2o_ema": h2o.H2O(score="ema", decay=0.9),
      "h2o_max": h2o.H2O(reduce="max", num_recent=1),
      "scissorhands": known["scissorhands"](history=7, num_recent=2),
      "tova": known["tova"](),
      "snapkv": known["snapkv"](window=4, kernel_size=3),
      "keyformer": known["keyformer"](num_steps=100, seed=1),
      "knorm": known["knorm"](num_recent=2),
      "keydiff": known["keydiff"](num_recent=2),
      "rkv": known["rkv"](window=5, num_recent=3),
      "lagkv": known["lagkv"](num_sinks=1, lag_size=4),
      "expected_attention": known["expected_attention"](
          num_sinks=2, num_recent=1, num_future=3
      ),
  }
