"""A model whose MLPs read less: by factors, and by predicted neurons.

Losses are of texts that are read under a rule from their first token on.

Letters: B texts, T tokens, D width, F neurons, L layers.
"""

from collections.abc import Callable, Iterable
import pathlib
import tempfile
from typing import Any

from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import contextual_sparsity
from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import sparsity_costs
from joma.inference.sparsity import unit_rules
from joma.inference.sparsity.study import capture
from joma.inference.sparsity.study import contextual_bench
from joma.inference.sparsity.study import predictor_training
from joma.studies import once
from joma.systems.reuse import distillation
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.layers import cross_entropy
from joma.transformer.layers import monarch


class Compressed:
  """A model, and its losses with MLPs that read a share of their weights.

  Args:
    model: The dense one.
    params: Its parameters.
    texts: What losses are of [B, T + 1].
  """

  def __init__(
      self,
      model: models.Transformer,
      params: PyTree,
      texts: Int[Array, "B T"],
  ):
    self.model, self.params, self.texts = model, params, texts
    self._run: Callable[..., Array] = once.jit(
        lambda params, tokens: _losses(model, params, tokens)
    )
    self.shape = sparsity_costs.mlp_shape(model.config)

  def losses(self, params: PyTree) -> Float[np.ndarray, "B"]:
    """Mean loss of each text, Monarch matrices as those they stand for."""
    params = densified(params)
    # One program, however many texts there are.
    run = lambda text: float(self._run(params, text[None])[0])
    return np.array([run(text) for text in self.texts])

  def projected(
      self, blocks: int, rank: int
  ) -> tuple[configs.TransformerConfig, PyTree, dict[str, float]]:
    """The model with MLPs of Monarch matrices; see `monarch.project_model`."""
    text = f"monarch:blocks={blocks}:rank={rank}:part=mlp"
    return monarch.project_model(self.model.config, self.params, text)

  def tuned(
      self,
      config: configs.TransformerConfig,
      params: PyTree,
      batches: Iterable[Int[Array, "B T"]],
      rate: float,
  ) -> PyTree:
    """Parameters after a step of Adam on each batch, factors being factors."""
    model = self.model.clone(config=config)
    return distillation.train(model, params, batches, rate)[0]

  def predict(
      self,
      texts: Int[Array, "B T"],
      predictor: contextual_config.PredictorConfig,
      share: float,
  ) -> PyTree:
    """Trains Deja Vu's predictors of the neurons that count.

    Args:
      texts: To learn from.
      predictor: What a predictor is, and how it learns.
      share: Of the neurons, which count, unless ReLU says which are at work.
    """
    config = self.model.config
    is_relu = config.activation == "relu" and not config.use_gated_mlp
    settings = contextual_config.CaptureConfig(
        label="sign" if is_relu else "contribution",
        label_fraction=share,
        batch_size=1,
    )
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      rows = np.asarray(texts)
      shards = capture.write(
          self.model, self.params, rows, folder / "capture", settings
      )
      data = predictor_training.split(shards, predictor, 1 / len(rows))
      return predictor_training.train(data, folder / "predictors")

  def with_neurons(
      self, rule: Any, num: int, learned: PyTree
  ) -> Float[np.ndarray, "B"]:
    """Mean loss of each text, `num` neurons of each token being computed.

    Args:
      rule: Of `unit_rules`, told how many by arrays.
      num: Neurons.
      learned: Predictors.
    """
    config = self.model.config
    plan = plan_lib.SparsityPlan(mlp=rule)
    model = contextual_sparsity.SparseTransformer(config, plan=plan)
    params = contextual_sparsity.prepare(
        config,
        self.params,
        predictors=learned,
        calibrated={"num_blocks": np.full(config.num_layers, num, np.int32)},
        to_decode=False,
    )
    read = lambda text: contextual_bench.read(model, params, text[None], 0)[0]
    return np.array([float(read(text)[0]) for text in self.texts])

  def num_neurons(self, num_weights: int, rule: Any) -> int:
    """Most neurons that a token can have for so many weights of an MLP."""
    read = lambda kept: rule.weights_read(self.shape, unit_rules.Kept(kept))
    each = (read(1.0) - read(0.0)) / self.shape.hidden_dim
    return int((num_weights - read(0.0)) / each + 1e-9)


def densified(params: PyTree) -> PyTree:
  """The same model with a kernel in the place of every MLP's factors."""
  changed = dict(params)
  for name, layer in params.items():
    if name.startswith("layers_"):
      mlp = {part: _dense(module) for part, module in layer["mlp"].items()}
      changed[name] = {**layer, "mlp": mlp}
  return changed


def _dense(module: dict[str, Any]) -> dict[str, Any]:
  rest = {k: v for k, v in module.items() if k not in monarch.FACTORS}
  return {**rest, "kernel": monarch.kernel_of(module)}


def _losses(
    model: models.Transformer, params: PyTree, tokens: Int[Array, "B T"]
) -> Float[Array, "B"]:
  logits = model.apply({"params": params}, tokens[:, :-1])
  return cross_entropy.token_losses(logits, tokens[:, 1:]).mean(axis=1)
