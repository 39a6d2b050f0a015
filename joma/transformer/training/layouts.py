"""How the state of a language model lies on devices.

`Replicated` keeps the whole state on every device and splits batches (`pmap`).
`Sharded` splits states too, by the table of `sharding`. Both take batches that
are whole, and the same, on every process, and hand each device its part. They
give the same losses, rounding and dropout masks aside.

Letters: D devices, N steps, B batch.
"""

from collections.abc import Callable, Hashable, Sequence
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, PyTree
import numpy as np

from joma.transformer import sharding
from joma.transformer.training import lm_config
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import mesh_config

_AXIS = "data"


class Replicated:
  """A copy of the state on each device: leaves [D, ...]."""

  def __init__(self, devices: Sequence[Any] | None = None):
    """Takes all devices, or those given."""
    devices = jax.devices() if devices is None else devices
    self._devices = sorted(devices, key=lambda d: (d.process_index, d.id))
    process = jax.process_index()
    self._is_local = np.array(
        [device.process_index == process for device in self._devices]
    )

  @property
  def num_parts(self) -> int:
    """Parts of a batch, D."""
    return len(self._devices)

  def init(self, make: Callable[..., PyTree], **static: Any) -> PyTree:
    """Makes a state, `make(**static)`, on each device."""
    compiled = _pmapped_init(make, tuple(self._devices), _items(static))
    return compiled(np.zeros(np.count_nonzero(self._is_local), np.float32))

  def map(
      self, fn: Callable[..., PyTree], *, donate: bool = False, **static: Any
  ) -> Callable[..., PyTree]:
    """Compiles `fn(state, batches, *shared, axis_name, **static)`.

    Args:
      fn: A pure function that sums over `axis_name`; of a module rather than a
        closure, since equal ones share a compilation.
      donate: Give the state's buffers up to the result.
      **static: Hashable, known at compile time.

    Returns:
      A function of a state, laid out, of host batches, leaves [N, B, ...], and
      of numbers that all devices share.
    """
    compiled = _pmapped(fn, tuple(self._devices), donate, _items(static))
    return lambda state, batches, *shared: compiled(
        state, self._split(batches), shared
    )

  def _split(self, batches: PyTree) -> PyTree:
    """Leaves [N, B, ...] as [D, N, B / D, ...], this process's rows of them."""

    def split(leaf: np.ndarray) -> np.ndarray:
      parts = leaf.reshape(len(leaf), self.num_parts, -1, *leaf.shape[2:])
      return parts.swapaxes(0, 1)[self._is_local]

    return jax.tree.map(split, batches)

  def gather(self, tree: PyTree) -> PyTree:
    """The copy of the first of all devices, on the host of every process.

    Copies that each device makes of its own, such as maps, differ in the last
    bit; recorded numbers are those of one device.
    """
    first = jax.tree.map(_first, tree)
    if jax.process_count() == 1:
      return first
    return multihost_utils.broadcast_one_to_all(first)

  def to_save(self, state: PyTree) -> PyTree:
    """What a checkpoint holds: the first local copy."""
    # A copy of its own: the buffers are given up to the next step.
    return jax.tree.map(lambda leaf: np.array(_first(leaf)), state)

  def to_restore(self, state: PyTree) -> PyTree:
    """Shapes of one copy, from those of a state laid out."""
    shape_of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return jax.tree.map(shape_of, state)

  def from_saved(self, saved: PyTree) -> PyTree:
    """A copy for each device."""
    place = NamedSharding(Mesh(np.array(self._devices), (_AXIS,)), P(_AXIS))

    def copy(leaf: PyTree) -> Array:
      leaf = np.asarray(leaf)
      shape = (len(self._devices), *leaf.shape)
      return jax.make_array_from_callback(shape, place, lambda _: leaf[None])

    return jax.tree.map(copy, saved)


# pmap compiles anew for each closure: a second run of a config, such as one
# that continues in the same process, shares the programs of the first.
@functools.lru_cache(maxsize=32)
def _pmapped(
    fn: Callable[..., PyTree],
    devices: tuple[jax.Device, ...],
    donate: bool,
    static: tuple[tuple[str, Hashable], ...],
) -> Callable[..., PyTree]:
  fn = functools.partial(fn, axis_name=_AXIS, **dict(static))
  return jax.pmap(
      lambda state, batches, shared: fn(state, batches, *shared),
      axis_name=_AXIS,
      in_axes=(0, 0, None),
      donate_argnums=0 if donate else (),
      devices=devices,
  )


@functools.lru_cache(maxsize=8)
def _pmapped_init(
    make: Callable[..., PyTree],
    devices: tuple[jax.Device, ...],
    static: tuple[tuple[str, Hashable], ...],
) -> Callable[[np.ndarray], PyTree]:
  # The axis has a name here too, or else `map` compiles for both kinds.
  return jax.pmap(
      lambda _: make(**dict(static)), axis_name=_AXIS, devices=devices
  )


def _items(static: dict[str, Any]) -> tuple[tuple[str, Hashable], ...]:
  return tuple(sorted(static.items()))


class Sharded:
  """One state split over a mesh, see `sharding`: leaves are global arrays."""

  def __init__(self, mesh: Mesh):
    self.mesh = mesh

  @property
  def num_parts(self) -> int:
    """Parts of a batch."""
    return sharding.num_batch_parts(self.mesh)

  def init(self, make: Callable[..., PyTree], **static: Any) -> PyTree:
    """Makes a state, `make(**static)`, each device its part."""
    make = functools.partial(make, **static)
    places = sharding.shardings(jax.eval_shape(make), self.mesh)
    return jax.jit(make, out_shardings=places)()

  def map(
      self, fn: Callable[..., PyTree], *, donate: bool = False, **static: Any
  ) -> Callable[..., PyTree]:
    """Compiles as `Replicated.map` does; a donated state is returned first."""

    def call(state: PyTree, batches: PyTree, *shared: Any) -> PyTree:
      with jax.set_mesh(self.mesh):
        return self.compiled(fn, state, donate, **static)(
            state, self._split(batches), *shared
        )

    return call

  def compiled(
      self,
      fn: Callable[..., PyTree],
      state: PyTree,
      donate: bool,
      **static: Any,
  ) -> jax.stages.Wrapped:
    """The jitted function behind `map`, for a state of these shapes."""
    key = (fn, donate, tuple(sorted(static.items())))
    if key not in self._jitted:
      whole = NamedSharding(self.mesh, P())
      places = sharding.shardings(state, self.mesh)
      self._jitted[key] = jax.jit(
          functools.partial(fn, axis_name=None, **static),
          donate_argnums=0 if donate else (),
          out_shardings=(places, whole) if donate else whole,
      )
    return self._jitted[key]

  @functools.cached_property
  def _jitted(self) -> dict[Any, Any]:
    return {}

  def _split(self, batches: PyTree) -> PyTree:
    def split(leaf: np.ndarray) -> Array:
      place = sharding.batch_sharding(self.mesh, leaf.ndim, batch_axis=1)
      return jax.make_array_from_callback(
          leaf.shape, place, lambda index: leaf[index]
      )

    return jax.tree.map(split, batches)

  def gather(self, tree: PyTree) -> PyTree:
    """Brings whole arrays to the host."""
    if jax.process_count() > 1:
      tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)

  def to_save(self, state: PyTree) -> PyTree:
    """A copy, as the buffers are given up to the next step."""
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    copy = jax.jit(_copy, out_shardings=places)
    return copy(state)

  def to_restore(self, state: PyTree) -> PyTree:
    """Shapes with their shardings."""
    places = sharding.shardings(state, self.mesh)
    shape_of = lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
    )
    return jax.tree.map(shape_of, state, places)

  def from_saved(self, saved: PyTree) -> PyTree:
    """What was restored lies where it should."""
    return saved


Layout = Replicated | Sharded


def make_layout(config: lm_config.LmConfig, data: int | None = None) -> Layout:
  """The layout of a run on all devices.

  Args:
    config: The run.
    data: Devices of a mesh along `data`; None is all that are left.

  Raises:
    UserError: If devices or batches cannot be split so.
  """
  if config.parallelism == "mesh":
    sizes = config.fsdp, config.tensor, config.seq
    mesh = sharding.make_mesh(*sizes)
    if data is not None:
      mesh = sharding.mesh_of((data, *sizes))
    layout = Sharded(mesh)
  else:
    layout = Replicated()
  check_batch(config, layout.num_parts)
  if config.remat == "offload" and jax.default_backend() == "cpu":
    raise errors.UserError(
        "remat=offload moves what layers gave from an accelerator to its host,"
        " and a CPU is its own: remat=dots keeps the same."
    )
  return layout


def check_batch(config: lm_config.LmConfig, num_parts: int) -> None:
  """Raises UserError if batches cannot be split into so many parts."""
  sequences, rest = divmod(config.batch_size, config.grad_accum)
  if rest or sequences % num_parts:
    fitting = mesh_config.divisors(sequences)
    raise errors.UserError(
        f"batch_size={config.batch_size} must be a multiple of {num_parts}"
        f" devices x grad_accum={config.grad_accum};"
        f" {mesh_config.listed(fitting)} devices would do."
    )


def _first(leaf: Array) -> np.ndarray:
  """The copy on the first local device."""
  if isinstance(leaf, jax.Array):
    leaf = leaf.addressable_shards[0].data
  return np.asarray(leaf)[0, ...]  # An array, without axes too.


def is_finite(tree: PyTree) -> Bool[np.ndarray, "1"]:
  """Whether there is no NaN or infinity, found where the parts lie."""
  leaves = jax.tree.leaves(tree)
  on_host = [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]
  laid_out = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
  is_good = all(np.isfinite(leaf).all() for leaf in on_host)
  return np.array([is_good and bool(_all_finite(laid_out))])


def _copy(tree: PyTree) -> PyTree:
  return jax.tree.map(jnp.copy, tree)


@jax.jit
def _all_finite(leaves: list[Array]) -> Array:
  """Whether all are finite, each looked at where it lies."""
  return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]))
