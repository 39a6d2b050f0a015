"""A model with its tokenizer: from a text to a text, or to attention maps.

  lm = language_model.load("SmolLM2-135M")
  lm.continue_text("The capital of France is", policy="h2o", capacity=64)
  lm.attn_weights("The capital of France is")

What these three lines do is `pretrained`, `tokenizer`, `generate` and
`kv_cache`, which take batches, meshes and everything else.

Letters: L layers, N query heads, K key heads, T tokens, C slots.
"""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree
import numpy as np

from joma.inference import generate
from joma.inference import sampling_config
from joma.inference import stop_tokens
from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names
from joma.transformer import layer_hooks
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer as tokenizers
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A model and what makes its tokens.

  Attributes:
    model: With its config.
    params: Of the model.
    tokenizer: From texts to ids and back.
    eos_ids: Tokens that end a text.
  """

  model: models.Transformer
  params: PyTree
  tokenizer: tokenizers.Tokenizer
  eos_ids: tuple[int, ...] = ()

  def continue_text(
      self,
      prompt: str,
      *,
      max_new_tokens: int = 64,
      policy: str = names.REFERENCE,
      capacity: int | None = None,
      sampler: sampling_config.SamplingConfig = sampling_config.GREEDY,
  ) -> str:
    """Returns what follows a prompt, as `launch.generate` says it.

    Args:
      prompt: Of a token at least.
      max_new_tokens: At most so many, from 1.
      policy: What the cache keeps, as `h2o` or `snapkv:window=8`.
      capacity: C, which a policy that evicts needs.
      sampler: How tokens are chosen; greedily by default.

    Raises:
      UserError: As `generate.stream`; the policy is unknown, or it and the
        capacity do not go together.
    """
    steps = self._steps(prompt, max_new_tokens, policy, capacity, sampler)
    ids = [int(tokens[0]) for tokens, _ in steps]
    if ids and ids[-1] in self.eos_ids:
      del ids[-1]
    return self.tokenizer.decode(ids)

  def kept_positions(
      self, text: str, *, policy: str, capacity: int
  ) -> Int[np.ndarray, "L K C"]:
    """Returns which tokens of a text stay, in order; -1 is an empty slot.

    Raises:
      UserError: As `continue_text`; or the policy has a cache of its own, or
        layers have different numbers of slots.
    """
    steps = self._steps(text, 1, policy, capacity, sampling_config.GREEDY)
    next(steps)
    assert steps.last is not None
    caches = steps.last.kv_cache
    is_slots = all(isinstance(c, kv_cache.SlotCache) for c in caches)
    if not is_slots or len({cache.pos.shape for cache in caches}) > 1:
      raise errors.UserError(
          f"policy={policy}: its layers have no slots of one number, and no"
          " positions of one shape; give one that keeps tokens in slots."
      )
    return np.sort([np.asarray(cache.pos[0]) for cache in caches], axis=-1)

  def attn_weights(self, text: str) -> Float[np.ndarray, "L N T T"]:
    """Returns who attends to whom; queries are rows, which softmax adds to 1.

    Raises:
      UserError: If the text has no tokens, or so many that the maps are larger
        than all memory; if a layer has no weights, as mixers have none.
    """
    variables, ids = {"params": self.params}, self._encode(text)
    if not ids:
      raise errors.UserError(
          "text has no tokens; attention needs one at least."
      )
    config = self.model.config
    require.memory(
        f"a text of {len(ids)} tokens with {config.num_layers} x"
        f" {config.num_heads} maps, twice",
        8 * config.num_layers * config.num_heads * len(ids) ** 2,
    )
    tokens = jnp.asarray(ids)[None]
    found: Any = self.model.apply(variables, tokens, mutable="intermediates")
    maps = []
    for layer in range(config.num_layers):
      attn = found[1]["intermediates"][f"layers_{layer}"]["attn"]
      if "attn_weights" not in attn:
        raise errors.UserError(f"layer {layer} has no attention weights.")
      maps.append(attn["attn_weights"][0][0])
    return np.asarray(jnp.stack(maps), np.float32)

  def _encode(self, text: str) -> list[int]:
    if not isinstance(text, str):
      raise errors.UserError(
          f"a text must be a string, got {type(text).__name__}."
      )
    return list(self.tokenizer.encode(text))

  def _steps(
      self,
      prompt: str,
      max_new_tokens: int,
      policy: str,
      capacity: int | None,
      sampler: sampling_config.SamplingConfig,
  ) -> generate.Steps:
    rule, caches = names.parse(policy), None
    if rule.evicts != (capacity is not None):
      need = "needs a capacity" if rule.evicts else "has no capacity"
      raise errors.UserError(f"policy={policy} {need}, got {capacity}.")
    if capacity is not None:
      config, dtype = self.model.config, self.model.dtype
      caches = kv_cache.init(rule, config, 1, capacity, dtype=dtype)
    return generate.stream(
        self.model,
        self.params,
        [self._encode(prompt)],
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        eos_ids=self.eos_ids,
        kv_cache=caches,
    )


def load(
    folder: str | os.PathLike[str],
    *,
    attention: tuple[str, ...] = (),
    dtype: Any = "float32",
) -> LanguageModel:
  """Reads a model, its tokenizer and its end tokens.

  Args:
    folder: As transformers or `launch.export` writes it, or `org/name` of
      Hugging Face.
    attention: Systems without parameters that are laid over the model, as
      `hip:k=1024`.
    dtype: Of parameters and products: float32, bfloat16 or float16.

  Raises:
    UserError: As `pretrained.load`, `tokenizer.from_folder` and
      `layer_hooks.over`.
  """
  tokenizer = tokenizers.from_folder(os.fspath(folder))
  config, params = pretrained.load(folder, dtype)
  config = layer_hooks.over(config, tuple(attention))
  model = models.Transformer(config, dtype)
  return LanguageModel(model, params, tokenizer, stop_tokens.read(folder))
