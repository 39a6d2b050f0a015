"""Fits `kvzap` to a model and says what it is worth beside KVzip itself.

  python -m launch.bench.language.kvzap_fit --model=DIR --weights=kvzap.npz \
      --corpus=wikitext2-raw --data_dir=DATA

Texts of the training split are read twice, as KVzip reads them, and a network a
layer learns its scores from the layer's input. On the test split, which nothing
was learned of: the correlation of what networks and KVzip say, the share of the
tokens that KVzip keeps which the networks keep too, and the perplexity of what
follows a context of which each policy keeps a share, over that with all of it:
each head as many tokens, or the best of all heads of a layer, or of the model.

Letters: B texts, T tokens of a context, L layers, K key heads.
"""

import dataclasses
import functools
from typing import Any, get_args

from absl import flags
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.inference import language_model
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.cache import policy as policy_lib
from joma.inference.cache import rehearsal
from joma.inference.evaluation import evaluate
from joma.inference.evaluation.protocols import scopes
from joma.inference.evaluation.ruler import ruler_config
from joma.systems.cache_policies import names as policy_names
from joma.systems.cache_policies.by_attention import kvzap
from joma.systems.profiles import kvzip_surrogate
from joma.transformer import model as models
from joma.transformer.text import corpus as corpus_lib
from joma.transformer.text import corpus_text
from launch.bench import harness
from launch.command import run
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import intervals
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import require
from scansnap_jax.experiment import workdir

# What is fitted, and whose scores it learns.
((_PUPIL, _TEACHER),) = policy_names.TEACHERS.items()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """What is read and fitted.

  Attributes:
    corpus: Text whose training split is learned from and whose test split is
      measured on, by name or as a file.
    num_texts: Training texts.
    num_held_out: Test texts.
    length: Tokens of a text, of which KVzip reads twice as many.
    rest: Tokens after a context whose perplexity is measured.
    budget: Share of the context's tokens that stay in the cache.
    policies: Cache policies that are measured besides KVzip and its networks.
    size: Hidden numbers of a layer's network.
    num_steps: Steps of AdamW.
    seed: Random seed that draws the texts and the networks' first values.
  """

  corpus: str = corpus_text.EMBEDDED
  num_texts: int = 64
  num_held_out: int = 8
  length: int = 256
  rest: int = 64
  budget: float = 0.5
  policies: tuple[str, ...] = (policy_names.SHOWN[-1], policy_names.BESIDE[-1])
  size: int = 64
  num_steps: int = 1000
  seed: int = 0

  def __post_init__(self):
    for name in ("num_texts", "size", "num_steps"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("num_held_out", "length", "rest"):
      require.at_least(name, getattr(self, name), 2)
    if not 0 < self.budget < 1:
      raise errors.UserError(
          f"budget={self.budget} must be between 0 and 1: a share that stays."
      )
    for name in self.policies:
      policy_names.parse(name)


def measure(
    folder: str, weights: str, data_dir: str | None, config: BenchConfig
) -> dict[str, Any]:
  """Fits the networks, writes them, and returns what they are worth.

  Args:
    folder: Of a model and its tokenizer.
    weights: File to write.
    data_dir: Where the corpus is looked for.
    config: What to read.

  Raises:
    UserError: The folder or the corpus cannot be read, or is too short.
  """
  path = json_file.local_path(weights)
  workdir.check_can_be_made(path, "--weights")
  lm = language_model.load(folder)
  training, held_out = _texts(lm, data_dir, config)
  request = _request(lm)
  settings = kvzip_surrogate.Settings(
      size=config.size, num_steps=config.num_steps, seed=config.seed
  )
  see = lambda rows: kvzip_surrogate.see(lm.model, lm.params, rows, request)
  networks, losses = kvzip_surrogate.fit(see(training), settings)
  workdir.make_folder(path.absolute().parent)
  kvzap.save(path, networks)
  seen = see(held_out[:, : config.length])
  found = {
      "training_tokens": training.size,
      "loss_first": float(losses[:20].mean()),
      "loss_last": float(losses[-20:].mean()),
      **_agreement(networks, seen, config),
  }
  harness.tell("the networks, on texts that they never saw", found)
  rows = perplexities(lm, held_out, str(path), request, config)
  harness.tell("perplexity over that of all tokens", rows)
  return {**found, "rows": rows}


def _texts(
    lm: language_model.LanguageModel, data_dir: str | None, config: BenchConfig
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "b t"]]:
  """Texts to learn of, and texts to measure on, with what follows them."""
  corpus = corpus_lib.load(
      config.corpus, tokenizer=lm.tokenizer, data_dir=data_dir
  )
  rng = np.random.default_rng(config.seed)
  whole = config.length + config.rest
  training = _pieces(corpus.train, config.num_texts, config.length, rng)
  return training, _pieces(corpus.test, config.num_held_out, whole, rng)


def _pieces(
    ids: Any, num: int, length: int, rng: np.random.Generator
) -> Int[np.ndarray, "num length"]:
  """Texts that do not overlap.

  Raises:
    UserError: There are not so many.
  """
  places = len(ids) // length
  if places < num:
    raise errors.UserError(
        f"the corpus has {len(ids)} tokens in a split, {places} texts of"
        f" {length}; {num} are wanted."
    )
  starts = np.sort(rng.choice(places, num, replace=False)) * length
  return np.stack([ids[at : at + length] for at in starts]).astype(np.int32)


def _request(lm: language_model.LanguageModel) -> tuple[int, ...]:
  """Tokens between a text and its repetition."""
  said = calls.request(policy_names.parse(_TEACHER))
  return tuple(map(int, lm.tokenizer.encode(said or "", special=False)))


def _agreement(
    networks: kvzap.Network, seen: kvzip_surrogate.Seen, config: BenchConfig
) -> dict[str, float]:
  """How alike networks and KVzip are, over heads of all layers."""
  found = kvzip_surrogate.correlation(networks, seen)
  said = np.asarray(
      jax.vmap(kvzap.log_scores)(
          jax.tree.map(jnp.asarray, networks), jnp.asarray(seen.x)
      )
  )
  kept = round(config.budget * config.length)
  best = lambda scores: np.argsort(-_by_text(scores, config.length), axis=2)
  ours, theirs = best(said)[:, :, :kept], best(seen.score)[:, :, :kept]
  both = (ours[:, :, :, None] == theirs[:, :, None]).any(axis=3).mean()
  return {
      "correlation_mean": float(found.mean()),
      "correlation_least_head": float(found.min()),
      "kept_by_both": float(both),
  }


def _by_text(scores: Float[Any, "L R K"], length: int) -> np.ndarray:
  """[L, B, T, K]."""
  return np.asarray(scores).reshape(len(scores), -1, length, scores.shape[-1])


def perplexities(
    lm: language_model.LanguageModel,
    texts: Int[np.ndarray, "B T"],
    weights: str,
    request: tuple[int, ...],
    config: BenchConfig,
) -> list[harness.Row]:
  """Returns a row a policy: perplexity over that of all tokens, by interval."""
  full = _losses(lm, texts, policy_names.REFERENCE, request, config)
  pupil = f"{_PUPIL}:weights={weights}"
  settings: list[tuple[str, ruler_config.Scope]] = [
      *((_TEACHER, scope) for scope in get_args(ruler_config.Scope)),
      *((pupil, scope) for scope in get_args(ruler_config.Scope)),
      *((name, "head") for name in config.policies),
  ]
  rows = []
  for name, scope in settings:
    more = _losses(lm, texts, name, request, config, scope) - full
    found = intervals.interval(np.exp(more), is_positive=True)
    rows.append({"policy": name.split(":weights")[0], "scope": scope, **found})
  return [
      {"policy": policy_names.REFERENCE, "mean": float(np.exp(full.mean()))},
      *rows,
  ]


def _losses(
    lm: language_model.LanguageModel,
    texts: Int[np.ndarray, "B T"],
    name: str,
    request: tuple[int, ...],
    config: BenchConfig,
    scope: ruler_config.Scope = "head",
) -> Float[np.ndarray, "B"]:
  """Mean cross-entropy of what follows each context."""
  found = [
      _loss(lm, texts[i : i + 1], name, request, config, scope)
      for i in range(len(texts))
  ]
  return np.concatenate(found)


def _loss(
    lm: language_model.LanguageModel,
    rows: Int[np.ndarray, "b T"],
    name: str,
    request: tuple[int, ...],
    config: BenchConfig,
    scope: ruler_config.Scope,
) -> Float[np.ndarray, "b"]:
  context, rest = np.split(rows, [config.length], axis=1)
  policy = policy_names.parse(name)
  # Room for what follows, which evicts nothing.
  slots = round(config.budget * config.length) if policy.evicts else None
  caches = _after(
      lm.model,
      policy,
      slots,
      scope,
      config.rest,
      request,
      lm.params,
      jnp.asarray(context),
  )
  starts = jnp.full((len(rows),), config.length, jnp.int32)
  read = evaluate.read(
      lm.model,
      lm.params,
      jnp.asarray(rest),
      starts,
      jnp.full_like(starts, config.rest),
      jnp.full((*rest.shape, 1), -1, jnp.int32),
      caches,
  )
  return np.asarray(read.losses.sum(axis=1)) / (config.rest - 1)


@functools.partial(
    jax.jit,
    static_argnames=("model", "policy", "slots", "scope", "more", "request"),
)
def _after(
    model: models.Transformer,
    policy: policy_lib.Policy,
    slots: int | None,
    scope: ruler_config.Scope,
    more: int,
    request: tuple[int, ...],
    params: PyTree,
    context: Int[Array, "b T"],
) -> tuple[Any, ...]:
  """Caches after a context, with room for `more` tokens; None keeps all."""
  batch, length = context.shape
  lengths = jnp.full((batch,), length, jnp.int32)
  # Whoever is chosen from all heads may have any number of tokens.
  is_whole = slots is None or scope != "head"
  size = length + more if is_whole else slots
  sized = calls.fitted(policy, size)
  caches = kv_cache.init(sized, model.config, batch, size)
  caches = rehearsal.prepare(caches, lengths)
  if rehearsal.are_rehearsing(caches):
    context, _ = rehearsal.repeat(context, lengths, request)
  found: Any = model.apply(
      {"params": params}, context, kv_cache=caches, logits_at=lengths - 1
  )
  caches = found[1]
  if slots is None:
    return caches
  if is_whole:
    return scopes.trim(
        caches, jnp.full_like(lengths, slots), lengths, scope=scope
    )
  return tuple(kv_cache.compact(c, slots + more, lengths) for c in caches)


if __name__ == "__main__":
  _MODEL = harness.define_model(
      "Hugging Face folder with a tokenizer, to fit to.", is_required=True
  )
  _WEIGHTS = flags.DEFINE_string(
      "weights", None, "File to write the networks to.", required=True
  )
  _DATA_DIR = run.define_data_dir()
  harness.run(
      BenchConfig(),
      lambda config: measure(
          _MODEL.value, _WEIGHTS.value, _DATA_DIR.value, config
      ),
  )
