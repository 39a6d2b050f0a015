"""Methods of `gated`: perplexity against weights read, row by row.

Letters: B texts, T tokens.
"""

from collections.abc import Callable, Mapping
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.inference.cost import model_size
from joma.inference.evaluation.protocols import saved_rows
from joma.inference.sparsity import contextual_config
from joma.inference.sparsity.gated import fitted
from joma.inference.sparsity.gated import router
from joma.inference.sparsity.gated import spec as specs
from joma.inference.sparsity.study import contextual_bench
from joma.inference.sparsity.study import contextual_subject
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy

Config = contextual_config.ContextualConfig


def measure(
    config: Config,
    subject: contextual_subject.Subject,
    rows: saved_rows.SavedRows,
) -> list[dict[str, Any]]:
  """Returns a row for each method and budget, the dense model's first.

  Rows that are there are not measured again.

  Args:
    config: Settings.
    subject: The model and its texts.
    rows: Where rows are kept.
  """
  make: Callable[[], fitted.Fitter] = functools.cache(
      lambda: _fitter(config, subject)
  )
  keys = [("dense", 1.0)]
  for budget in config.budgets:
    for name in config.methods:
      is_whole = specs.parse(name).name in specs.WHOLE
      keys.append((name, 1.0 if is_whole else budget))
  found: dict[Any, dict[str, Any]] = {}
  for name, budget in dict.fromkeys(keys):
    row = rows.find(rule=name, share=budget)
    if row is None:
      row = _row(config, subject, make, name, budget)
      rows.add(row, rule=name, share=budget)
    found[name, budget] = row
    _say(name, budget, row, found["dense", 1.0])
  dense = np.array(found["dense", 1.0]["losses"])
  return [
      {
          "rule": name,
          "share": budget,
          **contextual_bench.perplexity(np.array(row["losses"]), dense),
          **{key: row[key] for key in ("mlp_weights", "weights")},
      }
      for (name, budget), row in found.items()
  ]


def _fitter(
    config: Config, subject: contextual_subject.Subject
) -> fitted.Fitter:
  held_out = contextual_config.count(
      config.held_out_fraction, len(subject.texts.train)
  )
  return fitted.Fitter(
      models.Transformer(subject.config),
      subject.params,
      held_out=subject.texts.train[-held_out:],
      training=subject.texts.train[:-held_out],
      rank=config.predictor.rank,
      num_steps=config.predictor.num_steps,
      num_rows=config.predictor.batch_size,
  )


def _row(
    config: Config,
    subject: contextual_subject.Subject,
    make: Callable[[], fitted.Fitter],
    name: str,
    budget: float,
) -> dict[str, Any]:
  """Losses of the texts, and shares of weights that were read."""
  found = fitted.Fitted(None, {})
  if name != "dense":
    found = make().fit(specs.parse(name), budget)
  model = models.Transformer(subject.config)
  added = router.MethodRouter(
      arrays=found.arrays,
      config=subject.config,
      method=found.method,
      prompt_len=config.prompt_len,
  )
  texts, size = subject.texts.valid, config.eval_batch_size
  # As rules are measured: what does not fill a batch is not read.
  num = max(1, len(texts) // size)
  texts = texts[: num * size]
  parts = np.split(texts, num)
  read = [
      jax.tree.map(
          np.asarray, _read(model, subject.params, jnp.asarray(part), added)
      )
      for part in parts
  ]
  losses = np.concatenate([losses for losses, _ in read])
  num_tokens = texts.shape[0] * (texts.shape[1] - config.prompt_len)
  sums = {key: sum(part[key] for _, part in read) for key in read[0][1]}
  return {"losses": losses.tolist(), **_shares(subject, sums, num_tokens)}


def _shares(
    subject: contextual_subject.Subject,
    sums: Mapping[str, float],
    num_tokens: int,
) -> dict[str, float]:
  """Of the MLPs' weights, and of all that a step multiplies with."""
  size = model_size.count(subject.config)
  mlp = sums["mlp"] / num_tokens if sums["mlp"] else size.mlp
  projections = sum(
      part["kernel"].size
      for name, layer in subject.params.items()
      if name.startswith("layers_")
      for part in layer["attn"].values()
      if "kernel" in part
  )
  attention = sums["attn"] / num_tokens if sums["attn"] else projections
  whole = size.multiplied - size.mlp - projections + mlp + attention
  return {
      "mlp_weights": float(mlp / size.mlp),
      "weights": float(whole / size.multiplied),
  }


@functools.partial(jax.jit, static_argnames="model")
def _read(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    added: router.MethodRouter,
) -> tuple[Float[Array, "B"], dict[str, Any]]:
  """Mean losses of continuations, and weights read, summed over tokens."""
  logits, seen = model.apply(
      {"params": params},
      tokens,
      router=added,
      mutable=[router.COLLECTION],
  )
  losses = cross_entropy.token_losses(logits[:, :-1], tokens[:, 1:])
  sums = {"mlp": jnp.zeros(()), "attn": jnp.zeros(())}
  for path, leaf in jax.tree_util.tree_leaves_with_path(dict(seen)):
    part = "mlp" if any("mlp" in str(key) for key in path) else "attn"
    sums[part] += leaf
  return losses[:, added.prompt_len :].mean(axis=1), sums


def _say(
    name: str,
    budget: float,
    row: Mapping[str, Any],
    dense: Mapping[str, Any],
) -> None:
  change = np.exp(np.mean(row["losses"]) - np.mean(dense["losses"])) - 1
  print(
      f"{name} {budget:g}: {100 * row['mlp_weights']:.1f} % of the MLP weights,"
      f" perplexity {100 * change:+.2f} %",
      file=sys.stderr,
      flush=True,
  )
