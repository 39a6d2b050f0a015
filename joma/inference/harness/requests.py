"""What a harness asks of a model: likelihoods of continuations, and texts.

Without a policy texts are read at once. With one each token goes through the
policy's cache, from the first on, at a capacity: what is scored is what a model
with so little memory would give.

Letters: B texts, T tokens, V vocabulary.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.inference import generate
from joma.inference import prompt_ids
from joma.inference.cache import calls
from joma.inference.cache import kv_cache as kv_cache_lib
from joma.inference.cache import policy as policy_lib
from joma.inference.evaluation import evaluate
from joma.transformer import model as models
from joma.transformer.text import sizes
from joma.transformer.text import tokenizer as tokenizer_lib

# New tokens between two looks for a string that ends a text.
_LOOK_EVERY = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answerer:
  """A model that answers requests.

  Attributes:
    model: The Transformer.
    params: Its parameters.
    tokenizer: Its tokenizer.
    policy: What leaves a cache; None keeps everything.
    capacity: Slots of a KV head, where there is a policy.
    eos_ids: Tokens that end a text.
  """

  model: models.Transformer
  params: PyTree
  tokenizer: tokenizer_lib.Tokenizer
  policy: policy_lib.Policy | None = None
  capacity: int = 0
  eos_ids: tuple[int, ...] = ()

  def score(
      self, texts: Sequence[Sequence[int]], counts: Sequence[int]
  ) -> list[tuple[float, bool]]:
    """Returns log-likelihoods of the ends of texts, and if they are greedy.

    Args:
      texts: Ids, read side by side.
      counts: Tokens at the end of each text that are scored; at least one
        comes before them.
    """
    lengths = np.array([len(text) for text in texts], np.int32)
    size = sizes.length(int(lengths.max()), self.model.config)
    tokens = prompt_ids.padded([np.array(t) for t in texts], size)
    if self.policy is None:
      losses, best = _losses(self.model, self.params, tokens, lengths)
    else:
      losses, best = self._through_cache(tokens, lengths)
    losses, best = np.asarray(losses, np.float64), np.asarray(best)
    found = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
      # The loss at a token is that of the one after it.
      span = slice(length - count - 1, length - 1)
      target = tokens[row, length - count : length]
      is_greedy = bool((best[row, span] == target).all())
      found.append((-float(losses[row, span].sum()), is_greedy))
    return found

  def say(
      self,
      prompts: Sequence[Sequence[int]],
      *,
      max_new_tokens: int,
      until: Sequence[str] = (),
  ) -> list[str]:
    """Goes on from prompts greedily, up to a string or a number of tokens.

    Args:
      prompts: Ids, read side by side.
      max_new_tokens: Of a continuation, at most.
      until: Strings that end a continuation, of which they are no part.
    """
    new: list[list[int]] = [[] for _ in prompts]
    steps = generate.stream(
        self.model,
        self.params,
        [np.array(prompt, np.int32) for prompt in prompts],
        max_new_tokens=max_new_tokens,
        eos_ids=self.eos_ids,
        kv_cache=self._caches(len(prompts)),
    )
    for number, (tokens, is_new) in enumerate(steps, start=1):
      for row in np.flatnonzero(is_new):
        new[row].append(int(tokens[row]))
      if number % _LOOK_EVERY == 0 and all(
          any(stop in self._text(row) for stop in until) for row in new
      ):
        break
    return [_cut(self._text(row), until) for row in new]

  def _text(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode([i for i in ids if i not in self.eos_ids])

  def _caches(self, batch_size: int) -> PyTree:
    if self.policy is None:
      return None
    policy = calls.fitted(self.policy, self.capacity)
    return kv_cache_lib.init(
        policy, self.model.config, batch_size, self.capacity
    )

  def _through_cache(
      self, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, "B"]
  ) -> tuple[Array, Array]:
    nobody = np.full((*tokens.shape, 1), -1, np.int32)
    seen = evaluate.read(
        self.model,
        self.params,
        jnp.asarray(tokens),
        jnp.zeros_like(lengths),
        jnp.asarray(lengths),
        jnp.asarray(nobody),
        self._caches(len(tokens)),
    )
    return seen.losses, seen.next_tokens


@functools.partial(jax.jit, static_argnames="model")
def _losses(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
  """Cross-entropy of the token after each, and the likeliest one."""
  steps = jnp.arange(tokens.shape[1])[None]
  positions = jnp.where(steps < lengths[:, None], steps, -1)
  logits: Any = model.apply({"params": params}, tokens, positions=positions)
  targets = jnp.roll(tokens, -1, axis=1)[..., None]
  picked = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - picked
  return losses, jnp.argmax(logits, axis=-1)


def _cut(text: str, until: Sequence[str]) -> str:
  """A text up to the first of the strings that end it."""
  for stop in until:
    text = text.split(stop)[0] if stop else text
  return text
