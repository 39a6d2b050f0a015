"""Initial parameters of a run, from its seed, and whether they fit."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from joma.systems import names as systems
from joma.transformer import config as transformer_config
from joma.transformer import model as model_lib
from joma.transformer.layers import monarch
from joma.transformer.layers import scanning
from joma.transformer.training import lm_config
from scansnap_jax.experiment import require


def init_params(
    config: lm_config.LmConfig, model: model_lib.Transformer
) -> PyTree:
  """Draws the parameters of a run, float32.

  Returns:
    The tree that `model` defines.
  """
  if model.config.scan_layers:  # The same numbers, whatever the layout.
    one_by_one = model.clone(config=scanning.unrolled(model.config))
    return scanning.stack(init_params(config, one_by_one))
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  # Attention has no parameters: what computes it does not matter here.
  model = model.clone(implementation="reference")
  tokens = jnp.zeros((1, 2), jnp.int32)
  params: PyTree = model.init(key, tokens)["params"]
  if config.init == "pytorch":
    params = _like_pytorch(key, params)
  if config.identical_layers:
    layers = [name for name in params if name.startswith("layers_")]
    params = params | {name: params["layers_0"] for name in layers}
  return params


def _like_pytorch(key: Array, params: PyTree) -> PyTree:
  """Draws what PyTorch's language model tutorial starts from.

  Every draw is uniform in +-bound:

    embedding and output layer                bound .1, bias 0
    query, key, value (one fused matrix)      sqrt(6 / (fan_in + fan_out)) with
                                              the fan_out of all three, bias 0
    output projection of attention            1 / sqrt(fan_in), bias 0
    MLP                                       1 / sqrt(fan_in), biases too

  after https://pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention
  and torch.nn.Linear; norms keep scale 1 and bias 0, and the parameters of
  attention systems what those drew. The factors of a Monarch matrix are uniform
  too, so that its entries have the variance that those of a dense one had.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
  keys = jax.random.split(key, len(leaves))
  drawn = []
  for one, (path, leaf) in zip(keys, leaves, strict=True):
    names = [key.key for key in path]
    bound = _bound(names, params)
    drawn.append(
        leaf
        if bound is None
        else jax.random.uniform(one, leaf.shape, leaf.dtype, -bound, bound)
    )
  return jax.tree.unflatten(treedef, drawn)


def _bound(names: list[str], params: PyTree) -> float | None:
  """Largest value of a parameter's draw; None leaves it as it is."""
  *parents, module, name = names
  if module in ("token_embed", "position_embed"):
    return 0.1
  if module == "output":
    return 0.1 if name == "kernel" else 0.0
  if module.endswith("norm") or module in systems.SYSTEMS:
    return None
  here = params
  for parent in (*parents, module):
    here = here[parent]
  if name in monarch.FACTORS:
    return _factor_bound(name, here, _kernel_bound(parents, module, params))
  if name == "bias" and parents[-1:] == ["attn"]:
    return 0.0
  if name == "bias":
    return _fans(module, here)[0] ** -0.5
  return _kernel_bound(parents, module, params)


def _kernel_bound(parents: list[str], module: str, params: PyTree) -> float:
  """Of the matrix of a projection, dense or not."""
  layer = params
  for parent in parents:
    layer = layer[parent]
  fan_in = _fans(module, layer[module])[0]
  if module not in ("query", "key", "value"):
    return fan_in**-0.5
  fan_out = sum(
      _fans(part, layer[part])[1]
      for part in ("query", "key", "value")
      if part in layer  # A layer may take queries and keys of another.
  )
  return math.sqrt(6 / (fan_in + fan_out))


def _fans(name: str, module: PyTree) -> tuple[int, int]:
  """Inputs and outputs of a projection."""
  if "kernel" not in module:
    (blocks, inner, *_), outer = module["right"].shape, module["left"].shape[-1]
    return blocks * inner, blocks * outer
  shape = module["kernel"].shape
  # [D, N, H] into heads, [N, H, D] out of them.
  num_in = math.prod(shape[:-1]) if name == "out" else shape[0]
  return num_in, math.prod(shape) // num_in


def _factor_bound(name: str, module: PyTree, bound: float) -> float:
  """Of R products of two numbers summed as of one in +-bound."""
  _, inner, _, rank = module["right"].shape
  # right has variance 1 / P, so that what lies between is as large as x.
  return (
      (3 / inner) ** 0.5 if name == "right" else bound * (inner / rank) ** 0.5
  )


def check_memory(config: transformer_config.TransformerConfig) -> None:
  """Raises UserError if a model and its gradient are larger than all memory.

  Of accelerators, each of which may hold a part, nothing is known.
  """
  if jax.default_backend() == "cpu":
    number = _num_parameters(config)
    require.memory(
        f"a model of {number:,} parameters with its gradient", 8 * number
    )


@functools.lru_cache
def _num_parameters(config: transformer_config.TransformerConfig) -> int:
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  init = model_lib.Transformer(config, implementation="reference").init
  shapes = jax.eval_shape(
      lambda tokens: init(jax.random.key(0), tokens), tokens
  )
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
