"""Thresholds, low-rank parts and shares of a budget, found on texts.

What an MLP's error costs is its square times how steep the loss is there:

  cost = E ||y - y_dense||^2  E ||d loss / d y||^2

of each layer by itself, the errors of others aside.

Letters: L layers, B texts, T tokens, R rows (tokens), D width, F neurons, O
options, r rank.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Real
import numpy as np

from joma.inference.sparsity.gated import methods
from joma.inference.sparsity.gated import router
from joma.inference.sparsity.gated import weights as weights_lib
from joma.inference.sparsity.study import capture
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy


class Seen(NamedTuple):
  """Of calibration texts.

  Attributes:
    x: What each MLP reads.
    steepness: E ||d loss / d y||^2 of each MLP's output, the loss a token's.
    attention: What `query`, `key` and `value`, and `out` read, by name.
  """

  x: Float[np.ndarray, "L R D"]
  steepness: Float[np.ndarray, "L"]
  attention: Mapping[str, Float[np.ndarray, "L R D"]]


def see(
    model: models.Transformer,
    params: PyTree,
    texts: Int[np.ndarray, "B T"],
    has_slopes: bool = True,
) -> Seen:
  """Reads texts, none of those that are measured on, two at a time.

  Args:
    model: The dense model.
    params: Its parameters.
    texts: Token ids.
    has_slopes: Whether `steepness` and `attention` are wanted; else it is 1,
      and there is none.
  """
  reads, slopes = [], []
  for start in range(0, len(texts), 2):
    part = jnp.asarray(texts[start : start + 2])
    found = _reads(model, params, part)
    # Of texts that are learned from the MLPs' side alone is wanted.
    wanted = found if has_slopes else {"x": found["x"]}
    reads.append(jax.tree.map(np.asarray, wanted))
    if has_slopes:
      slopes.append(np.asarray(_steepness(model, params, part)))
  joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *reads)
  x = joined.pop("x")
  steepness = np.mean(slopes, axis=0) if slopes else np.ones(len(x))
  return Seen(x, steepness, joined)


@functools.partial(jax.jit, static_argnames="model")
def _reads(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> dict[str, Float[Array, "L R _"]]:
  """By name, what matrices read."""
  norms = ("mlp_norm", "attn_norm")
  _, seen = model.apply(
      {"params": params},
      tokens,
      mutable="intermediates",
      capture_intermediates=lambda module, _: module.name in norms,
  )
  seen: Any = seen["intermediates"]
  config = model.config
  is_after = config.norm_placement == "post"
  found: dict[str, list[Array]] = {"x": [], "in": [], "out": []}
  layer_in = seen["resid_embed"][0]
  rows = lambda x: x.reshape(tokens.size, -1)
  for layer in range(config.num_layers):
    here = seen[f"layers_{layer}"]
    resid = capture.mlp_input(config, layer_in, here["resid_attn"][0])
    normed = lambda name, x, here=here: (
        x if is_after else here[name]["__call__"][0]
    )
    found["x"].append(rows(normed("mlp_norm", resid)))
    found["in"].append(rows(normed("attn_norm", layer_in)))
    found["out"].append(rows(here["attn"]["head_out"][0]))
    layer_in = here["resid_mlp"][0]
  return {name: jnp.stack(values) for name, values in found.items()}


@functools.partial(jax.jit, static_argnames="model")
def _steepness(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, "L"]:
  config = model.config
  shape = (config.num_layers, *tokens.shape, config.embed_dim)

  def loss(shifts: Array) -> Array:
    added = router.ShiftRouter(shifts)
    logits: Any = model.apply({"params": params}, tokens, router=added)
    return cross_entropy.token_losses(logits[:, :-1], tokens[:, 1:]).sum()

  slopes = jax.grad(loss)(jnp.zeros(shape))
  return jnp.square(slopes).sum(axis=-1).mean(axis=(1, 2))


def layer_weights(
    model: models.Transformer, params: PyTree, layer: int
) -> weights_lib.Weights:
  """Of the MLP of one layer."""
  return weights_lib.of_layer(model.config, params[f"layers_{layer}"]["mlp"])


def quantiles(
    sizes: Float[np.ndarray, "L R n"], shares: Sequence[float] | np.ndarray
) -> Float[np.ndarray, "L Q"]:
  """Sizes above which such shares of each layer's numbers lie; 0 for all."""
  flat = np.abs(sizes.reshape(len(sizes), -1))
  found = np.quantile(flat, 1 - np.asarray(shares), axis=1, method="higher").T
  return np.where(np.asarray(shares)[None] >= 1, 0, found).astype(np.float32)


def low_rank(
    kernel: Float[np.ndarray, "n m"], x: Float[np.ndarray, "R n"], rank: int
) -> dict[str, Float[np.ndarray, "_ _"]]:
  """`first` [n, r] and `last` [r, m] whose product is nearest to x W.

  The singular value decomposition of C^(1/2) W, C the second moment of x: of
  all matrices of rank r the least E ||x W - x A B||^2 on these rows.
  """
  moment = (x.T @ x).astype(np.float64) / len(x)
  # Directions that no row has are told apart by a part in 10^6.
  moment += 1e-6 * np.trace(moment) / len(moment) * np.eye(len(moment))
  values, vectors = np.linalg.eigh(moment)
  root = vectors * np.sqrt(values)
  left, sizes, right = np.linalg.svd(root.T @ kernel, full_matrices=False)
  undone = (vectors / np.sqrt(values)) @ left[:, :rank]
  last = sizes[:rank, None] * right[:rank]
  narrow = lambda a: np.ascontiguousarray(a, np.float32)
  return {"first": narrow(undone), "last": narrow(last)}


@functools.partial(jax.jit, static_argnames="method")
def errors(
    method: methods.Method,
    weights: weights_lib.Weights,
    x: Float[Array, "R D"],
    arrays: Mapping[str, Any],
    options: Mapping[str, Real[Array, "O"]],
) -> tuple[Float[Array, "O"], Float[Array, "O"]]:
  """Weights that options read, and their squared errors, means over rows.

  Args:
    method: Of the MLP.
    weights: Of one layer.
    x: What it reads.
    arrays: What the method was calibrated to.
    options: Settings of each option by name, which take arrays' places.
  """
  dense = weights.out(weights.dense_hidden(x))

  def one(setting: Mapping[str, Array]) -> tuple[Array, Array]:
    found = method.update(weights, x, {**arrays, **setting})
    error = jnp.square(found.out - dense).sum(axis=-1).mean()
    return found.read.mean(), error

  return jax.lax.map(one, dict(options))
