"""Losses and measures of one model under every rule of leaving out.

Letters: L layers, B texts, T tokens.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import contextual_sparsity
from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import sparsity_costs
from joma.inference.sparsity import sparsity_metrics
from joma.inference.sparsity import unit_rules
from joma.inference.sparsity.study import contextual_subject
from joma.inference.sparsity.study import predictor_training
from joma.inference.sparsity.study import training_free
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from scansnap_jax.experiment import intervals

Config = contextual_config.ContextualConfig

# Texts that Cats and Teal are calibrated on.
_NUM_QUANTILE_TEXTS = 8


class Measured(NamedTuple):
  """Of one rule: mean loss of each text, and sums of every layer."""

  losses: Float[np.ndarray, "B"]
  sums: Mapping[str, Any]


class Bench:
  """Measures rules on the same continuations."""

  def __init__(
      self,
      config: Config,
      subject: contextual_subject.Subject,
      settings: contextual_config.CaptureConfig,
      learned: predictor_training.ByKind,
      data: predictor_training.Data,
  ):
    self._config, self._subject, self._data = config, subject, data
    self._settings, self._learned = settings, learned
    self._num_units = settings.num_units(subject.config.hidden_dim)

  def measure(
      self,
      rule: unit_rules.UnitRule | None,
      head_rule: unit_rules.HeadRule | None,
      arrays: Mapping[str, Any],
  ) -> Measured:
    """Reads all continuations under a rule.

    Args:
      rule: Of neurons.
      head_rule: Of heads.
      arrays: What the rules want beside the predictors; leaves [L].
    """
    config = self._config
    plan = plan_lib.SparsityPlan(
        mlp=rule,
        heads=head_rule,
        block_size=self._settings.block_size,
        lookahead=config.predictor.lookahead,
        prompt_len=config.prompt_len,
        label=self._settings.label,
        num_positive_heads=contextual_config.count(
            config.predictor.head_fraction, self._subject.config.num_heads
        ),
    )
    model = contextual_sparsity.SparseTransformer(
        self._subject.config, plan=plan
    )
    params = contextual_sparsity.prepare(
        self._subject.config,
        self._subject.params,
        predictors=self._learned,
        calibrated=arrays,
        to_decode=False,
    )
    texts, size = self._subject.texts.valid, config.eval_batch_size
    # All of one shape: what is left over is not read.
    num = max(1, len(texts) // size)
    texts = texts[: num * size]
    found = [
        read(model, params, jnp.asarray(part), config.prompt_len)
        for part in np.split(texts, num)
    ]
    losses = np.concatenate([np.asarray(part[0]) for part in found])
    sums = [jax.tree.map(np.float64, part[1]) for part in found]
    return Measured(losses, jax.tree.map(lambda *x: np.sum(x, axis=0), *sums))

  def unit_rows(self, dense: Measured) -> list[dict[str, Any]]:
    """Every rule of neurons at every share."""
    rows = []
    for name, rule, shares in self._unit_rules():
      for share, arrays in shares:
        found = self.measure(rule, None, arrays)
        rows.append({
            "rule": name,
            "share": share,
            **perplexity(found.losses, dense.losses),
            **self._unit_costs(rule, found.sums),
            **_means(found.sums["mlp"]),
            "layers": sparsity_metrics.summarize(found.sums["mlp"]),
        })
    return rows

  def _unit_rules(self):
    """Yields (name, rule, [(share, arrays), ...])."""
    config, subject = self._config, self._subject
    predicted = unit_rules.Predicted(
        nonlinearity=config.predictor.nonlinearity,
        rank=config.predictor.rank,
        num_units=self._num_units,
    )
    numbers = [
        (share, {"num_blocks": self._everywhere(share, self._num_units)})
        for share in config.shares
    ]
    yield "predicted", predicted, numbers
    yield "griffin", unit_rules.Griffin(), numbers
    yield "oracle", unit_rules.Oracle(), numbers
    yield "random", unit_rules.Random(seed=config.seed), numbers
    levels = training_free.calibrate(
        models.Transformer(subject.config),
        subject.params,
        jnp.asarray(subject.texts.train[:_NUM_QUANTILE_TEXTS]),
        config.shares,
    )
    quantiles = [
        (share, {name: values[:, i] for name, values in levels.items()})
        for i, share in enumerate(config.shares)
    ]
    yield "cats", unit_rules.Cats(), quantiles
    yield "teal", unit_rules.Teal(), quantiles
    find = lambda recall: predictor_training.calibrate(
        self._learned, self._data, recall
    )
    yield "calibrated", predicted, [
        (recall, {"mlp_threshold": find(recall)["mlp"]})
        for recall in config.recalls
    ]

  def _everywhere(self, share: float, num: int) -> Int[np.ndarray, "L"]:
    """A share of `num` things, for every layer."""
    found = contextual_config.count(share, num)
    return np.full(self._subject.config.num_layers, found, np.int32)

  def _unit_costs(
      self, rule: unit_rules.UnitRule, sums: Mapping[str, Any]
  ) -> dict[str, float]:
    shape = self._subject.config
    layers = sparsity_metrics.summarize(sums["mlp"])
    inputs = sums["inputs"] * shape.hidden_dim / sums["mlp"].tokens
    count = lambda hidden: sparsity_costs.shares(
        shape,
        rule,
        [unit_rules.Kept(*one) for one in zip(hidden, inputs, strict=True)],
    )
    one, batch = count(layers["kept"]), count(layers["union"])
    # Teal's batches read a union of entries of x too, which is not counted.
    is_known = not isinstance(rule, unit_rules.Teal)
    return {
        "mlp_weights": float(one.mlp),
        "weights": float(one.weights),
        "flops": float(one.flops),
        "batch_weights": float(batch.weights) if is_known else float("nan"),
    }

  def head_rows(self, dense: Measured) -> list[dict[str, Any]]:
    """Heads predicted, known and drawn, and what missing keys do."""
    config, shape = self._config, self._subject.config
    base = unit_rules.HeadRule(
        nonlinearity=config.predictor.nonlinearity,
        rank=min(config.predictor.head_rank, shape.embed_dim),
        seed=config.seed,
    )
    rules = {
        "heads": base,
        "heads, missing keys zero": dataclasses.replace(
            base, missing_kv="zero"
        ),
        "heads, oracle": dataclasses.replace(base, chosen_by="oracle"),
        "heads, random": dataclasses.replace(base, chosen_by="random"),
    }
    rows = []
    for name, rule in rules.items():
      for share in config.head_shares:
        arrays = {"num_heads": self._everywhere(share, shape.num_heads)}
        found = self.measure(None, rule, arrays)
        rows.append({
            "rule": name,
            "share": share,
            **perplexity(found.losses, dense.losses),
            **self._head_costs(rule, found.sums),
            **_means(found.sums["heads"]),
            "layers": sparsity_metrics.summarize(found.sums["heads"]),
        })
    return rows

  def _head_costs(
      self, rule: unit_rules.HeadRule, sums: Mapping[str, Any]
  ) -> dict[str, float]:
    shape, heads = self._subject.config, sums["heads"]
    query = sparsity_metrics.summarize(heads)["kept"]
    kv = sums["kv_heads"] * shape.num_heads / heads.tokens
    kept = [
        sparsity_costs.KeptHeads(*one) for one in zip(query, kv, strict=True)
    ]
    found = sparsity_costs.shares(shape, None, (), rule, kept)
    return {"weights": float(found.weights), "flops": float(found.flops)}


@functools.partial(jax.jit, static_argnames=("model", "prompt_len"))
def read(
    model: contextual_sparsity.SparseTransformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    prompt_len: int,
) -> tuple[Float[Array, "B"], dict[str, Any]]:
  """Mean losses of continuations, and sums by name, leaves [L].

  Args:
    model: With a plan.
    params: Of `contextual_sparsity.prepare`.
    tokens: Whole texts.
    prompt_len: Tokens of the prompt; what the last of them predicts is the
      dense model's and does not count.
  """
  logits, seen = model.apply({"params": params}, tokens, mutable=["sparsity"])
  losses = cross_entropy.token_losses(logits[:, :-1], tokens[:, 1:])
  sown: Any = seen.get("sparsity", {})
  layers = [
      _by_name(sown[f"layers_{layer}"])
      for layer in range(model.config.num_layers)
      if sown
  ]
  found = jax.tree.map(lambda *x: jnp.stack(x), *layers) if layers else {}
  return losses[:, prompt_len:].mean(axis=1), found


def _by_name(tree: PyTree) -> dict[str, Any]:
  """Sown values by their names, whichever module of a layer sowed them."""
  found = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      found |= _by_name(value)
    else:
      found[name] = value[0]
  return found


def _means(sums: sparsity_metrics.Sums) -> dict[str, float]:
  """Measures over all layers together."""
  total = jax.tree.map(lambda leaf: leaf.sum(), sums)
  found = sparsity_metrics.summarize(total)
  means = {name: float(value) for name, value in found.items()}
  # The error is relative to each layer's own output.
  layers = sparsity_metrics.summarize(sums)["output_error"]
  return means | {"output_error": float(np.mean(layers))}


def perplexity(losses: Any, dense: Any = None) -> dict[str, float]:
  """Returns that of mean losses [B]; beside others, the change in between."""
  found = {"perplexity": float(np.exp(losses.mean()))}
  if dense is None:
    return found
  # Of the logarithm, where changes of texts are near normal.
  change = intervals.interval(losses - dense)
  ratio = lambda x: float(np.exp(x) - 1)
  return found | {
      "change": ratio(change["mean"]),
      "change_low": ratio(change["low"]),
      "change_high": ratio(change["high"]),
  }
