"""The models of `reuse`, and the text that they are asked about."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

from etils import epy

from joma.studies import settings as settings_lib
from scansnap_jax.experiment import require

with epy.lazy_imports():  # --help imports this file, and waits for no jax.
  import jax
  import jax.numpy as jnp
  import numpy as np

  from joma.studies import once
  from joma.systems.reuse import distillation
  from joma.transformer import config as configs
  from joma.transformer import model as models
  from joma.transformer.hf import pretrained
  from joma.transformer.layers import cross_entropy
  from joma.transformer.text import corpus as corpus_lib

# Batches that losses are of.
_NUM_TEST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReuseConfig:
  """What may layers take from others?

  Attributes:
    num_seeds: Models that are trained, and draws of texts.
    first_seed: The seeds are first_seed, first_seed + 1, ...
    model: Folder of a Hugging Face model, or its name there, as
      org/name@revision; none trains models.
    corpus: The text.
    num_layers: Layers of the models that are trained.
    width: Size of the residual stream of the models that are trained, a
      multiple of 16.
    num_steps: Steps of training of each model.
    seq_len: Tokens of a text.
    batch_size: Texts of a step, and a quarter of those that losses are of.
    rate: Learning rate of training; a third of it distils.
    block: Keys of a block.
    num_blocks: Blocks that layers read which are not full.
    num_full: Layers of a plan that read everything.
    num_random: Most plans of as many full layers to compare with.
    num_distil: Steps of each stage.
  """

  num_seeds: int = 3
  first_seed: int = 0
  model: str = ""
  corpus: str = "tinyshakespeare"
  num_layers: int = 6
  width: int = 64
  num_steps: int = 300
  seq_len: int = 96
  batch_size: int = 8
  rate: float = 3e-3
  block: int = 8
  num_blocks: int = 4
  num_full: int = 2
  num_random: int = 4
  num_distil: int = 40

  def __post_init__(self):
    require.at_least("num_seeds", self.num_seeds, 2)
    require.seeds("first_seed", self.first_seed, self.num_seeds)
    for name in ("num_layers", "num_blocks"):
      require.at_least(name, getattr(self, name), 2)
    if not self.model:
      require.between("num_full", self.num_full, 2, self.num_layers - 1)
    for name in ("num_steps", "num_distil", "num_random", "batch_size"):
      require.at_least(name, getattr(self, name), 1)
    require.positive("rate", self.rate)
    require.between("block", self.block, 1, self.seq_len)
    settings_lib.require_multiple("width", self.width, 16)

  @property
  def num_first(self) -> int:
    """Tokens whose loss does not count: they see no more than is read."""
    return min(self.block * self.num_blocks, self.seq_len - 2)


class Subject:
  """A model and the text that it is asked about.

  Attributes:
    config: Settings.
    model: The Transformer.
    params: Its parameters.
    test: Texts [B, T + 1] that it was not trained on.
  """

  def __init__(self, config: ReuseConfig, seed: int):
    self.config, self.seed = config, seed
    text = corpus_lib.load(config.corpus, tokenizer=config.model or "bytes")
    self._train, held = np.asarray(text.train), np.asarray(text.valid)
    self.test = jnp.concatenate([*self._draw(held, _NUM_TEST, 1)])
    if config.model:
      shape, self.params = pretrained.load(config.model)
      self.model = models.Transformer(shape, implementation="xla")
      return
    heads = config.width // 16
    shape = configs.TransformerConfig(
        vocab_size=text.tokenizer.vocab_size,
        num_layers=config.num_layers,
        embed_dim=config.width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=16,
        hidden_dim=2 * config.width,
    )
    self.model = models.Transformer(shape, implementation="xla")
    draw = once.jit(lambda key: self.model.init(key, self.test[:1, :2]))
    params = draw(jax.random.key(seed))["params"]
    texts = self.texts(config.num_steps, 2)
    self.params, _ = distillation.train(self.model, params, texts, config.rate)

  def texts(self, num: int, stream: int) -> Iterator[jax.Array]:
    """Draws texts of the train split; one stream, one sequence of draws."""
    return self._draw(self._train, num, stream)

  def _draw(
      self, ids: np.ndarray, num: int, stream: int
  ) -> Iterator[jax.Array]:
    rng = np.random.default_rng((self.seed, stream))
    length = self.config.seq_len + 1
    for _ in range(num):
      starts = rng.integers(0, len(ids) - length, self.config.batch_size)
      yield jnp.asarray(
          np.stack([ids[start : start + length] for start in starts]), jnp.int32
      )

  def over(self, entry: str) -> models.Transformer:
    """The model with a system in every layer."""
    shape = dataclasses.replace(self.model.config, attention=(entry,))
    return self.model.clone(config=shape)

  def loss(self, model: models.Transformer, params: Any) -> float:
    """Mean cross-entropy of the test's tokens that count."""
    return float(_loss(model, params, self.test, self.config.num_first))


@functools.cache
def _jitted() -> Any:
  def loss(model: Any, params: Any, tokens: Any, num_first: int) -> Any:
    logits = model.apply({"params": params}, tokens[:, :-1])
    losses = cross_entropy.token_losses(logits, tokens[:, 1:])
    return losses[:, num_first:].mean()

  return once.jit(loss, static_argnums=(0, 3))


def _loss(
    model: models.Transformer, params: Any, tokens: jax.Array, num_first: int
) -> jax.Array:
  return _jitted()(model, params, tokens, num_first)
