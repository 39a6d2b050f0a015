"""A checkpoint some of whose heads are closed, for `moh`.

Letters: B texts, T tokens, L layers, N heads.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.studies import once
from joma.systems.routers import moh_norms
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.layers import cross_entropy
from joma.transformer.text import corpus as corpus_lib

RULES = ("norms", "random", "fixed")


def measure(
    folder: str, corpus: str, num_tokens: int, num_texts: int
) -> dict[str, Any]:
  """Perplexity of a text against the share of heads that each token has.

  The fixed heads are those of each layer whose removal, of one alone, costs
  most on as many tokens of the corpus's train split.

  Args:
    folder: Of the checkpoint.
    corpus: See `corpus.load`; its validation split is read.
    num_tokens: T of each text.
    num_texts: B.

  Returns:
    "shares" of active heads, "perplexity" of all heads, and by rule of `RULES`
    at each share.
  """
  shape, params = pretrained.load(folder)
  configs.require_dense(shape, "A study of removed heads")
  text = corpus_lib.load(corpus, tokenizer=folder)
  model = models.Transformer(shape, implementation="xla")
  test, train = (
      _first(ids, num_texts, num_tokens) for ids in (text.valid, text.train)
  )
  costs = removal_costs(model, params, train)
  num_heads = shape.num_heads
  counts = sorted({max(1, round(num_heads * k / 4)) for k in (1, 2, 3)})

  def perplexity(entries: tuple[str, ...]) -> float:
    changed = model.clone(
        config=dataclasses.replace(model.config, attention=entries)
    )
    run = once.jit(functools.partial(_loss, changed))
    return float(np.exp(run(params, test)))

  return {
      "shares": [count / num_heads for count in counts],
      "perplexity": perplexity(()),
      "by_rule": {
          rule: [perplexity(entries(rule, count, costs)) for count in counts]
          for rule in RULES
      },
  }


def entries(
    rule: str, count: int, costs: Float[np.ndarray, "L N"]
) -> tuple[str, ...]:
  """Entries of all layers by which each token has `count` heads.

  Args:
    rule: Of `RULES`.
    count: Heads.
    costs: Of removing each head; fixed ones are those of the greatest.
  """
  name = moh_norms.MohNorms.name
  if rule != "fixed":
    return (f"{name}:active={count}:by={rule}",)
  best = np.argsort(-costs, axis=1)[:, :count]
  return tuple(
      f"{name}:heads=" + ".".join(map(str, sorted(row)))
      for row in best.tolist()
  )


def removal_costs(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[np.ndarray, "L N"]:
  """Loss with one head removed, of every head of every layer."""
  run = once.jit(functools.partial(_without, model))
  layers, heads = model.config.num_layers, model.config.num_heads
  return np.array([
      [float(run(params, tokens, layer, head)) for head in range(heads)]
      for layer in range(layers)
  ])


def _without(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    layer: Int[Array, ""],
    head: Int[Array, ""],
) -> Float[Array, ""]:
  """One program for all heads: a head whose output is multiplied by 0."""
  changed = dict(params)
  for number in range(model.config.num_layers):
    name = f"layers_{number}"
    attn = params[name]["attn"]
    kernel = attn["out"]["kernel"]
    is_it = (jnp.arange(len(kernel)) == head) & (number == layer)
    out = {**attn["out"], "kernel": jnp.where(is_it[:, None, None], 0, kernel)}
    changed[name] = {**params[name], "attn": {**attn, "out": out}}
  return _loss(model, changed, tokens)


def _loss(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, ""]:
  logits = model.apply({"params": params}, tokens[:, :-1])
  return cross_entropy.token_losses(logits, tokens[:, 1:]).mean()


def _first(
    ids: np.ndarray, num_texts: int, num_tokens: int
) -> Int[Array, "B T"]:
  size = num_texts * (num_tokens + 1)
  return jnp.asarray(np.asarray(ids[:size], np.int32).reshape(num_texts, -1))
