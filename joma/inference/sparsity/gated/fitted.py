"""Methods, fitted to a model and to budgets on calibration texts.

Letters: L layers, O options, R rows (tokens), F neurons.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Real
import numpy as np

from joma.inference.sparsity.gated import allocation
from joma.inference.sparsity.gated import calibration
from joma.inference.sparsity.gated import error_training
from joma.inference.sparsity.gated import methods
from joma.inference.sparsity.gated import spec as specs
from joma.inference.sparsity.gated import weights as weights_lib
from joma.transformer import model as models
from scansnap_jax.experiment import errors

# Shares that options keep: twentieths, and for two kinds of inputs eighths.
_SHARES = np.arange(1, 21) / 20
_PAIRED = np.arange(1, 9) / 8
# Rows of a layer that options are tried on.
_ROWS = 256


class Fitted(NamedTuple):
  """A method and its arrays, leaves [L, ...]."""

  method: methods.Method | None
  arrays: dict[str, Any]


class Fitter:
  """Fits methods; what they share is computed once."""

  def __init__(
      self,
      model: models.Transformer,
      params: PyTree,
      *,
      held_out: Any,
      training: Any,
      rank: int,
      num_steps: int = 600,
      num_rows: int = 256,
  ):
    """Reads the texts that thresholds and shares are calibrated on.

    Args:
      model: The dense model.
      params: Its parameters.
      held_out: Texts [B, T] that nothing else is learned from.
      training: Texts that low-rank parts and predictors learn from.
      rank: r of both.
      num_steps: AdamW steps of predictors.
      num_rows: Tokens of a step.
    """
    self._model, self._params, self._rank = model, params, rank
    self._num_steps, self._num_rows = num_steps, num_rows
    self._training = training
    self._seen = calibration.see(model, params, held_out)
    num_rows = self._seen.x.shape[1]
    self._rows = np.linspace(0, num_rows - 1, min(_ROWS, num_rows)).astype(int)
    self._options: dict[Any, Any] = {}
    # Parts of low rank by matrix, and predictors by the size of blocks.
    self._parts: dict[str, Any] = {}
    self._predictors: dict[int, Any] = {}

  def fit(self, spec: specs.Spec, budget: float) -> Fitted:
    """Returns a method that reads about `budget` of the MLPs' weights.

    Raises:
      UserError: Blocks do not divide the neurons.
    """
    config = self._model.config
    if config.hidden_dim % spec.block_size:
      raise errors.UserError(
          f"methods: blocks of {spec.block_size} do not divide the"
          f" {config.hidden_dim} neurons of a layer."
      )
    if spec.name in specs.WHOLE:
      bits = int(spec.name.removeprefix("int"))
      return Fitted(methods.Quantized(bits=bits), {})
    if spec.name == "teal_attention":
      return self._with_attention(budget)
    method, arrays = self._method(spec.name, spec.block_size)
    settings, reads, costs = self._tried(spec, method, arrays)
    size = self._weights(0).size
    chosen = _choose(spec.spread, reads, costs, budget * size)
    picked = {
        name: values[np.arange(len(chosen)), chosen]
        for name, values in settings.items()
    }
    as_array = lambda x: jnp.asarray(x)
    return Fitted(method, jax.tree.map(as_array, {**arrays, **picked}))

  def _weights(self, layer: int) -> weights_lib.Weights:
    return calibration.layer_weights(self._model, self._params, layer)

  def _method(
      self, name: str, block_size: int
  ) -> tuple[methods.Method, dict[str, Any]]:
    """The method, and what it learns whatever its budget."""
    rank, inner = self._rank, self._weights(0).inner
    if name == "teal":
      return methods.Teal(), {}
    if name == "rsparse":
      return methods.RSparse(rank=rank), self._low((*inner, "down"))
    if name == "cats":
      return methods.Cats(), {}
    if name == "oracle":
      return methods.Oracle(block_size=block_size), {}
    if name == "sketch":
      method = methods.Sketched(rank=rank, block_size=block_size)
      return method, self._low(inner)
    if name == "output_error":
      method = methods.Learned(rank=rank, block_size=block_size)
      if block_size not in self._predictors:
        self._predictors[block_size] = self._learned(block_size)
      return method, {"predictor": self._predictors[block_size]}
    is_filled = name == "int4_filled"
    return methods.Coded(is_filled=is_filled, block_size=block_size), {}

  @functools.cached_property
  def _training_seen(self) -> calibration.Seen:
    return calibration.see(
        self._model, self._params, self._training, has_slopes=False
    )

  def _low_of(self, name: str) -> dict[str, np.ndarray]:
    """Low-rank parts of one matrix of every layer."""
    found = []
    for layer, x in enumerate(self._training_seen.x):
      weights = self._weights(layer)
      if name == "down":
        x = np.asarray(weights.dense_hidden(jnp.asarray(x)))
      kernel = np.asarray(weights.kernels[name])
      found.append(calibration.low_rank(kernel, x, self._rank))
    return jax.tree.map(lambda *parts: np.stack(parts), *found)

  def _low(self, names: Sequence[str]) -> dict[str, Any]:
    for name in names:
      if name not in self._parts:
        self._parts[name] = self._low_of(name)
    return {f"low_{name}": self._parts[name] for name in names}

  def _learned(self, block_size: int) -> dict[str, np.ndarray]:
    """Predictors of every layer, for half of the blocks."""
    num_units = self._model.config.hidden_dim // block_size
    found = []
    for layer, x in enumerate(self._training_seen.x):
      predictor, _ = error_training.train(
          self._weights(layer),
          jnp.asarray(x),
          num=max(1, num_units // 2),
          rank=self._rank,
          num_steps=self._num_steps,
          batch=self._num_rows,
          block_size=block_size,
          seed=layer,
      )
      found.append(jax.tree.map(np.asarray, predictor))
    return jax.tree.map(lambda *parts: np.stack(parts), *found)

  def _tried(
      self, spec: specs.Spec, method: methods.Method, arrays: Mapping[str, Any]
  ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Settings [L, O] by name, weights that they read, and their costs."""
    key = (spec.name, spec.block_size, spec.spread == "even")
    if key not in self._options:
      settings = self._settings(spec)
      of_layer = lambda tree, layer: jax.tree.map(
          lambda leaf: jnp.asarray(leaf[layer]), dict(tree)
      )
      found = [
          calibration.errors(
              method,
              self._weights(layer),
              jnp.asarray(self._seen.x[layer, self._rows]),
              of_layer(arrays, layer),
              of_layer(settings, layer),
          )
          for layer in range(len(self._seen.x))
      ]
      reads, squares = (np.array(part) for part in zip(*found, strict=True))
      costs = squares * self._seen.steepness[:, None]
      self._options[key] = settings, reads, costs
    return self._options[key]

  def _settings(self, spec: specs.Spec) -> dict[str, Real[np.ndarray, "L O"]]:
    num_layers = len(self._seen.x)
    if spec.name in specs.CHOOSERS:
      num_units = self._model.config.hidden_dim // spec.block_size
      nums = np.maximum(1, np.round(_SHARES * num_units)).astype(np.int32)
      return {"num": np.tile(np.unique(nums), (num_layers, 1))}
    if spec.name == "cats":
      return {"least": self._of_hidden("activation", _SHARES)}
    shares = _SHARES if spec.spread == "even" else _PAIRED
    of_x = calibration.quantiles(self._seen.x, shares)
    of_h = self._of_hidden("hidden", shares)
    if spec.spread == "even":
      return {"least_x": of_x, "least_h": of_h}
    # Every pair of a share of x and one of h.
    num = len(shares)
    return {
        "least_x": np.repeat(of_x, num, axis=1),
        "least_h": np.tile(of_h, (1, num)),
    }

  def _of_hidden(self, kind: str, shares: np.ndarray) -> np.ndarray:
    """Quantiles of h, or of act alone, layer by layer."""
    found = []
    for layer, x in enumerate(self._seen.x):
      weights = self._weights(layer)
      read = methods.activation if kind == "activation" else _hidden
      values = np.asarray(read(weights, jnp.asarray(x)))
      found.append(calibration.quantiles(values[None], shares)[0])
    return np.stack(found)

  def _with_attention(self, budget: float) -> Fitted:
    """TEAL of the whole model: every matrix keeps the same share of inputs."""
    shares, seen = [budget], self._seen
    of_in = calibration.quantiles(seen.attention["in"], shares)[:, 0]
    of_out = calibration.quantiles(seen.attention["out"], shares)[:, 0]
    arrays = {f"least_{name}": of_in for name in ("query", "key", "value")}
    arrays |= {
        "least_out": of_out,
        "least_x": calibration.quantiles(seen.x, shares)[:, 0],
        "least_h": self._of_hidden("hidden", np.array(shares))[:, 0],
    }
    as_array: Callable[[Any], Array] = jnp.asarray
    return Fitted(methods.Teal(), {k: as_array(v) for k, v in arrays.items()})


def _hidden(weights: weights_lib.Weights, x: Array) -> Array:
  return weights.dense_hidden(x)


def _choose(
    spread: str, reads: np.ndarray, costs: np.ndarray, budget: float
) -> np.ndarray:
  """The option of each layer; `budget` is a layer's."""
  if spread == "layers":
    return allocation.allocate(reads, costs, budget * len(reads))
  if spread == "split":
    return np.concatenate([
        allocation.allocate(reads[i : i + 1], costs[i : i + 1], budget)
        for i in range(len(reads))
    ])
  means = reads.mean(axis=0)
  fits = np.flatnonzero(means <= budget)
  one = fits[np.argmax(means[fits])] if len(fits) else int(np.argmin(means))
  return np.full(len(reads), one)
