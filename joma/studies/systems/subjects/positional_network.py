"""The networks of `positional`, and what they are to make of lists.

Letters: B lists, n numbers of a list, D width, F width of the inner layer.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import attention
from joma.transformer import config as configs
from kernels_pallas import masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
  """The network of one task, as `training.Problem`; its score is - loss.

  Attributes:
    kind: Of KINDS.
    task: Of TASKS.
    num_inputs: n.
    width: D.
    batch_size: Lists of a step.
  """

  kind: str
  task: str
  num_inputs: int
  width: int
  batch_size: int

  @property
  def num_layers(self) -> int:
    """As many as halvings of a list, and one."""
    return math.ceil(math.log2(self.num_inputs)) + 1

  @property
  def attend(self) -> attention.Attention:
    """Attention of every layer."""
    config = configs.TransformerConfig(
        num_layers=1,
        embed_dim=self.width,
        num_heads=2,
        num_kv_heads=2,
        head_dim=self.num_inputs + 1,
        max_len=self.num_inputs,
        positions="none",
        attention=("positional",) if self.kind == "positional" else (),
    )
    return attention.Attention(config, 0, implementation="reference")

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Draws the parameters; those of layers have them as their first axis."""
    width, layers = self.width, self.num_layers
    x = jnp.zeros((1, self.num_inputs, width))
    make = lambda: self.attend.init(key, x, *self._where(1))["params"]
    shapes = {
        "embed": (1, width),
        "out": (width, 1),
        "places": (self.num_inputs, width),
        "up": (layers, 2 * width, width),
        "down": (layers, width, width),
        "attn": jax.tree.map(
            lambda leaf: (layers, *leaf.shape), jax.eval_shape(make)
        ),
    }
    # All at once: to draw each by itself takes seconds to compile.
    is_shape = lambda x: isinstance(x, tuple)
    leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
    sizes = [math.prod(shape) for shape in leaves]
    ends = np.cumsum(sizes)[:-1].tolist()
    drawn = jnp.split(jax.random.normal(key, (sum(sizes),)), ends)
    # Of kernels [.., D, N, H] and [.., D, F] alike, D is the fan-in.
    fan_in = lambda shape: shape[1] if len(shape) > 3 else shape[-2]
    scaled = [
        (2 / fan_in(shape)) ** 0.5 * values.reshape(shape)
        for shape, values in zip(leaves, drawn, strict=True)
    ]
    return jax.tree.unflatten(tree, scaled)

  def _where(self, batch: int) -> tuple[Any, ...]:
    """Positions and mask: all see all."""
    size = self.num_inputs
    places = jnp.broadcast_to(jnp.arange(size)[None], (batch, size))
    return places, masks.full(size, size)

  def apply(self, params: Mapping[str, Any], numbers: jax.Array) -> jax.Array:
    """Returns what the network makes of lists of numbers [B, n]."""
    x = numbers[..., None] @ params["embed"]
    if self.kind == "standard":
      x = x + params["places"][None]
    where = self._where(len(numbers))

    def layer(
        x: jax.Array, weights: tuple[Any, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
      attn, up, down = weights
      attended = self.attend.apply({"params": attn}, x, *where)[0]
      both = jnp.concatenate([x, attended], axis=-1)
      return jax.nn.relu(both @ up) @ down, None

    weights = tuple(params[name] for name in ("attn", "up", "down"))
    x, _ = jax.lax.scan(layer, x, weights)
    return (x @ params["out"])[..., 0]

  def loss(
      self, params: Mapping[str, Any], key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Mean squared error of new lists."""
    loss = self.error(params, key, 1.0, self.batch_size)
    return loss, -loss

  def error(
      self,
      params: Mapping[str, Any],
      key: jax.Array,
      scale: float | jax.Array,
      num_lists: int,
  ) -> jax.Array:
    """Mean squared error on lists of numbers from [-2 scale, 2 scale]."""
    numbers = draw_lists(key, (num_lists, self.num_inputs), scale)
    missed = self.apply(params, numbers) - answer(self.task, numbers)
    return jnp.square(missed).mean()


def draw_lists(
    key: jax.Array, shape: tuple[int, int], scale: float | jax.Array
) -> jax.Array:
  """Draws lists of numbers from [-2 scale, 2 scale]."""
  return jax.random.uniform(key, shape, minval=-2, maxval=2) * scale


def answer(task: str, numbers: jax.Array) -> jax.Array:
  """What a task makes of lists of numbers [B, n]."""
  if task == "sort":
    return jnp.sort(numbers, axis=1)
  if task == "sum":
    return jnp.cumsum(numbers, axis=1)
  return jax.lax.cummin(numbers, axis=1)
