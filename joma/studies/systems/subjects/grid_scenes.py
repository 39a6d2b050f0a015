"""The tasks of `grid`: two marks on a grid, and boxes that a word names.

Letters: B scenes, R rows, C columns, T tokens, D width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from joma.studies import texts
from joma.systems.readouts import boxes
from joma.transformer import model as models
from joma.transformer import probes

# Of `Marks`: cells, the token that reads, and the first of two classes.
_EMPTY, _ONE, _TWO, _OTHERS, _REG, _CLASS = 0, 1, 2, 3, 7, 8
_NUM_COLOURS = 4
# Of `Boxes`: roles of tokens.
WORD, NAMED, OTHER, REST, NUM_ROLES = 0, 1, 2, 3, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
  """Whether the second mark is on the first one's row: `texts.Task`.

  The second is k cells behind the first on the flattened grid, on its row or
  at the start of the next one; other cells are empty or hold other marks. The
  last token, [REG], is asked.

  Attributes:
    size: R and C, 4 or more.
    others: Share of the other cells that hold other marks.
  """

  size: int
  others: float = 0.2

  @property
  def vocab_size(self) -> int:
    """Cells, [REG], and two classes."""
    return _CLASS + 2

  def draw(self, key: Array, num_texts: int) -> texts.Texts:
    """Draws scenes."""
    keys = jax.random.split(key, 6)
    size, shape = self.size, (num_texts,)
    apart = jax.random.randint(keys[0], shape, 2, size - 1)
    label = jax.random.randint(keys[1], shape, 0, 2)
    # On one row there are size - k places of the first mark, else k.
    number = jnp.where(label == 0, size - apart, apart)
    column = jax.random.randint(keys[2], shape, 0, number)
    column += jnp.where(label == 0, 0, size - apart)
    row = jax.random.randint(keys[3], shape, 0, size - 1)
    first = (row * size + column)[:, None]
    place = jnp.arange(size**2)[None]
    cells = jax.random.randint(
        keys[4], (num_texts, size**2), _OTHERS, _OTHERS + _NUM_COLOURS
    )
    has = jax.random.bernoulli(keys[5], self.others, cells.shape)
    cells = jnp.where(has, cells, _EMPTY)
    cells = jnp.where(place == first, _ONE, cells)
    cells = jnp.where(place == first + apart[:, None], _TWO, cells)
    tokens = jnp.pad(cells, ((0, 0), (0, 1)), constant_values=_REG)
    is_last = jnp.arange(tokens.shape[1])[None] == size**2
    is_last = jnp.broadcast_to(is_last, tokens.shape)
    targets = jnp.where(is_last, _CLASS + label[:, None], 0)
    return texts.Texts(tokens, targets, is_last, is_last)


class Scenes(NamedTuple):
  """Grids with two boxes, and a word.

  Attributes:
    tokens: The word, the grid, [REG].
    box: Of the colour that the word names: centre and size, of the grid's.
    roles: Of the tokens.
  """

  tokens: Int[Array, "B T"]
  box: Float[Array, "B 4"]
  roles: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Boxes:
  """Where the named box is: a `training.Problem`.

  Two boxes of unlike colours lie in the left and in the right half of a grid;
  a word in front of it names one of them, and [REG] behind it says the box.

  Attributes:
    size: R and C, even.
    batch_size: Scenes of a step.
    model: Reads the scenes.
  """

  size: int
  batch_size: int
  model: models.Transformer

  @property
  def head(self) -> boxes.BoxHead:
    """The head."""
    return boxes.BoxHead(2 * self.model.config.embed_dim)

  def draw(self, key: Array, num_scenes: int) -> Scenes:
    """Draws scenes."""
    keys = jax.random.split(key, 5)
    size, half = self.size, self.size // 2
    shape = (2, num_scenes)
    extent = jax.random.randint(keys[0], (2, *shape), 1, half + 1)
    # Rows go over the whole grid, columns over a half of it.
    room = jnp.array([size, half])[:, None, None]
    least = jax.random.randint(keys[1], extent.shape, 0, room - extent + 1)
    least += jnp.array([[[0], [0]], [[0], [half]]])
    first = jax.random.randint(keys[2], (num_scenes,), 0, _NUM_COLOURS)
    shift = jax.random.randint(keys[3], (num_scenes,), 1, _NUM_COLOURS)
    colour = 1 + jnp.stack([first, (first + shift) % _NUM_COLOURS])
    place = jnp.arange(size)[None, None, None]
    within = (place >= least[..., None]) & (place < (least + extent)[..., None])
    covers = within[0][..., :, None] & within[1][..., None, :]
    covers = covers.reshape(*shape, size**2)
    chosen = jax.random.randint(keys[4], (num_scenes,), 0, 2)
    rows = jnp.arange(num_scenes)
    cells = (covers * colour[..., None]).sum(axis=0)
    word = (1 + _NUM_COLOURS + colour[chosen, rows] - 1)[:, None]
    reg = jnp.full_like(word, 2 * _NUM_COLOURS + 1)
    named, other = covers[chosen, rows], covers[1 - chosen, rows]
    roles = jnp.where(named, NAMED, jnp.where(other, OTHER, REST))
    roles = jnp.pad(roles, ((0, 0), (1, 1)), constant_values=REST)
    centre = (least + extent / 2)[::-1, chosen, rows]
    box = jnp.concatenate([centre, extent[::-1, chosen, rows]]).T / size
    return Scenes(
        tokens=jnp.concatenate([word, cells, reg], axis=1),
        box=box.astype(jnp.float32),
        roles=roles.at[:, 0].set(WORD),
    )

  def init(self, key: Array) -> PyTree:
    """Draws the parameters."""
    keys = jax.random.split(key, 2)
    tokens = jnp.zeros((1, 2), jnp.int32)
    state = jnp.zeros((1, self.model.config.embed_dim))
    return {
        "model": self.model.init(keys[0], tokens)["params"],
        "head": self.head.init(keys[1], state)["params"],
    }

  def read(self, params: PyTree, tokens: Int[Array, "B T"]) -> tuple[Any, Any]:
    """The box that [REG] says, and what the model has sown."""
    _, seen = self.model.apply(
        {"params": params["model"]}, tokens, mutable="intermediates"
    )
    state = probes.stream_of(seen, self.model.config)[:, -1, -1]
    return self.head.apply({"params": params["head"]}, state), seen

  def loss(self, params: PyTree, key: Array) -> tuple[Array, Array]:
    """L1 and GIoU, and the mean intersection over union."""
    scenes = self.draw(key, self.batch_size)
    box, _ = self.read(params, scenes.tokens)
    score = boxes.iou(boxes.corners(box), boxes.corners(scenes.box))
    return boxes.loss(box, scenes.box).mean(), score.mean()
