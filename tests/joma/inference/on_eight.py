"""A program of eight devices: generation and reading on meshes.

Run as `python -m tests.joma.inference.on_eight [MESH...]`, with meshes as
`2,1,2,1`; prints a line of JSON for each policy and mesh: whether tokens and
kept positions are those of one device. The last lines say what is exchanged in
a step of decoding.
"""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from joma.inference import decode_steps
from joma.inference import generate
from joma.inference import on_mesh
from joma.inference.cache import calls
from joma.inference.cache import kv_cache
from joma.inference.evaluation import evaluate
from joma.inference.evaluation import tasks
from joma.systems.cache_policies import names
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment.processes import mesh_config

MESHES = (
    "1,1,2,1",
    "1,1,4,1",
    "2,1,1,1",
    # Key heads that tensor does not divide; a ring reads the prompts.
    "1,1,8,1",
    "1,1,2,2",
)
POLICIES = ("full", "h2o", "streaming_llm", "snapkv")
# No other size is 18, by which arrays of a cache are known.
_CAPACITY, _NUM_NEW = 18, 20
_EXCHANGE = r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("
_LENGTHS = (37, 40, 21, 33)


@functools.cache
def _model():
  config = configs.TransformerConfig(
      vocab_size=64,
      num_layers=2,
      embed_dim=32,
      num_heads=8,
      num_kv_heads=4,
      head_dim=8,
      hidden_dim=64,
      tie_embeddings=False,
  )
  model = models.Transformer(config)
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = model.init(jax.random.key(0), tokens)["params"]
  # Widened, so that logits are apart and tokens do not repeat.
  return model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def _caches(policy):
  model, _ = _model()
  if policy == "full":
    return generate.empty_caches(model, len(_LENGTHS), max(_LENGTHS) + _NUM_NEW)
  made = calls.fitted(names.parse(policy), _CAPACITY)
  return kv_cache.init(made, model.config, len(_LENGTHS), _CAPACITY)


def _kept(caches):
  found = [np.sort(np.asarray(c.kept_positions())) for c in caches]
  return np.stack(found)


def _generated(policy, params):
  rng = np.random.default_rng(1)
  model, _ = _model()
  prompts = [rng.integers(0, 64, n).astype(np.int32) for n in _LENGTHS]
  options = dict(max_new_tokens=_NUM_NEW, kv_cache=_caches(policy))
  steps = generate.stream(model, params, prompts, **options)
  tokens = np.stack([tokens for tokens, _ in steps])
  kept = 0 if policy == "full" else _kept(steps.last.kv_cache)
  return tokens, kept


def _answered(policy, params):
  """What `evaluate_cache` reads off examples, token by token."""
  rng = np.random.default_rng(2)
  model, _ = _model()
  shape = (len(_LENGTHS), 24)
  targets = np.where(rng.random(shape) < 0.2, 1, -1)
  batch = tasks.Batch(
      tokens=rng.integers(0, 64, shape).astype(np.int32),
      lengths=np.array([24, 20, 23, 24], np.int32),
      num_context=np.zeros(len(_LENGTHS), np.int32),
      targets=targets.astype(np.int32),
      gold=np.where(targets >= 0, 3, -1)[..., None].astype(np.int32),
      num_new=4,
  )
  seen = evaluate.answer(model, params, batch, _caches(policy))
  kept = 0 if policy == "full" else _kept(seen.kv_cache)
  return seen.predicted, seen.generated, seen.recall, kept


def _seen(policy, params):
  return _generated(policy, params), _answered(policy, params)


def _is_equal(found, alone):
  # Recall is NaN where nothing is asked.
  return bool(np.array_equal(found, alone, equal_nan=True))


def _exchanged(params):
  """Exchanges of a step with h2o, and how many of them are of a cache."""
  model, _ = _model()
  zeros = jnp.zeros(len(_LENGTHS), jnp.int32)
  state = decode_steps.state_of(zeros, zeros + 1, _caches("h2o"))
  state = decode_steps.decode_step(model, params, state)
  # As a step leaves it, split.
  lowered = decode_steps.decode_step.lower(model, params, state)
  lines = [
      line
      for line in lowered.compile().as_text().splitlines()
      if re.search(_EXCHANGE, line)
  ]
  of_cache = [
      line for line in lines if re.search(rf"[\[,]{_CAPACITY}[,\]]", line)
  ]
  return {"exchanges": len(lines), "of_cache": len(of_cache)}


def main(meshes):
  """Prints the lines."""
  _, params = _model()
  alone = {policy: _seen(policy, params) for policy in POLICIES}
  for name in meshes or MESHES:
    sizes = mesh_config.sizes_of(name)
    number = int(np.prod(sizes))
    with on_mesh.of_sizes(sizes, jax.devices()[:number]):
      laid_out = on_mesh.place(params, sizes, jax.devices()[:number])
      for policy in POLICIES:
        found = _seen(policy, laid_out)
        equal = jax.tree.map(_is_equal, found, alone[policy])
        is_equal = all(jax.tree.leaves(equal))
        row = {"mesh": name, "policy": policy, "is_equal": is_equal}
        row["num_tokens"] = len(np.unique(alone[policy][0][0]))
        print(json.dumps(row), flush=True)
      print(json.dumps({"mesh": name} | _exchanged(laid_out)), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
