"""Boxes read off a token: the head, and what it is trained by.

A [REG] token reads text and grid; an MLP of its state says a box, as centre and
size, and the loss is the L1 distance of those and 1 - GIoU of the corners
(TransVG, https://arxiv.org/abs/2104.08541; GIoU, https://arxiv.org/abs/1902.09630).

  GIoU = |A and B| / |A or B| - (|C| - |A or B|) / |C|

with C the smallest box round both: from -1 to 1, and with a gradient where the
boxes do not touch, which IoU has not.

Letters: D width; * axes of boxes. Boxes are numbers of one unit, [*, 4].
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# Of an area: boxes without one have a quotient, and a gradient.
_TINY = 1e-9


class BoxHead(nn.Module):
  """A state to a box, its centre and size from 0 to 1.

  Attributes:
    hidden_dim: Of the MLP.
  """

  hidden_dim: int = 64

  @nn.compact
  def __call__(self, state: Float[Array, "*b D"]) -> Float[Array, "*b 4"]:
    """Returns x, y of the centre, width, height."""
    hidden = nn.relu(nn.Dense(self.hidden_dim, name="up")(state))
    return nn.sigmoid(nn.Dense(4, name="down")(hidden))


def corners(box: Float[Array, "*b 4"]) -> Float[Array, "*b 4"]:
  """Centre and size to the corners: least x, least y, most x, most y."""
  centre, half = box[..., :2], box[..., 2:] / 2
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def iou(
    one: Float[Array, "*b 4"], two: Float[Array, "*b 4"]
) -> Float[Array, "*b"]:
  """Intersection over union of boxes by their corners."""
  both, either = _areas(one, two)
  return both / jnp.maximum(either, _TINY)


def giou(
    one: Float[Array, "*b 4"], two: Float[Array, "*b 4"]
) -> Float[Array, "*b"]:
  """Generalized intersection over union of boxes by their corners."""
  _, either = _areas(one, two)
  least = jnp.minimum(one[..., :2], two[..., :2])
  most = jnp.maximum(one[..., 2:], two[..., 2:])
  around = jnp.maximum((most - least).prod(axis=-1), _TINY)
  return iou(one, two) - (around - either) / around


def loss(
    box: Float[Array, "*b 4"], want: Float[Array, "*b 4"]
) -> Float[Array, "*b"]:
  """L1 of centre and size, and 1 - GIoU.

  Args:
    box: Centre and size.
    want: Likewise.
  """
  far = jnp.abs(box - want).sum(axis=-1)
  return far + 1 - giou(corners(box), corners(want))


def _areas(one: Array, two: Array) -> tuple[Array, Array]:
  """Of the intersection, and of the union."""
  area = lambda x: (x[..., 2:] - x[..., :2]).prod(axis=-1)
  least = jnp.maximum(one[..., :2], two[..., :2])
  most = jnp.minimum(one[..., 2:], two[..., 2:])
  both = jnp.maximum(most - least, 0).prod(axis=-1)
  return both, area(one) + area(two) - both
