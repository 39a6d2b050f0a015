"""Compiles the real step of training or decoding for a slice that is not there.

The functions are those that the trainer and `generate` call, the shardings
those of the trainer's table; in decoding caches go by sequences over data and
fsdp and by key heads over tensor.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jaxtyping import PyTree
import numpy as np

from joma.inference import decode_steps
from joma.inference.cache import kv_cache as kv_caches
from joma.scale import plan_config
from joma.systems.cache_policies import names as policy_names
from joma.transformer import full_cache
from joma.transformer import model as models
from joma.transformer import sharding
from joma.transformer.config import TransformerConfig
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from kernels_pallas.aot import overflow
from kernels_pallas.aot import topology
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled step.

  Attributes:
    text: The program of one device.
    part_bytes: Bytes on a device of what the step is given, by name: of each
      array its part, unpadded.
    argument_bytes: The same by the compiler, padding included.
    temp_bytes: What it allocates beside arguments and outputs.
    output_bytes: Of outputs that take no argument's place.
    code_bytes: Of the program.
    host_bytes: What it keeps in the memory of the device's host.
    xla_flops: XLA's own count, bodies of loops once.
  """

  text: str
  part_bytes: dict[str, int]
  argument_bytes: int
  temp_bytes: int
  output_bytes: int
  code_bytes: int
  host_bytes: int
  xla_flops: float | None

  @property
  def held_bytes(self) -> int:
    """What a device holds at most."""
    return (
        self.argument_bytes
        + self.temp_bytes
        + self.output_bytes
        + self.code_bytes
    )


def compile_step(
    config: plan_config.PlanConfig,
    model: TransformerConfig,
    sizes: tuple[int, ...],
) -> Step:
  """Compiles a step on a mesh of data x fsdp x tensor x seq devices.

  Raises:
    UserError: There is no such topology, or no compiler for it.
    OutOfHbm: The compiler found that a device has too little memory.
  """
  try:
    _, devices = topology.named_devices(config.topology, config.num_slices)
  except (ValueError, topology.ToolchainMissing) as error:
    raise errors.UserError(str(error)) from error
  mesh = sharding.mesh_of(sizes, devices)
  lower = _lower_train if config.task == "train" else _lower_decode
  with overflow.explained():
    lowered, parts = lower(config, model, mesh)
    with jax.set_mesh(mesh):
      return _describe(topology.compiled(lowered), parts)


def _describe(compiled: jax.stages.Compiled, parts: dict[str, PyTree]) -> Step:
  memory: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis() or {}
  return Step(
      text=compiled.as_text() or "",
      part_bytes={name: _part_bytes(tree) for name, tree in parts.items()},
      argument_bytes=memory.argument_size_in_bytes,
      temp_bytes=memory.temp_size_in_bytes,
      output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
      code_bytes=memory.generated_code_size_in_bytes,
      host_bytes=memory.host_temp_size_in_bytes,
      xla_flops=cost.get("flops"),
  )


def _part_bytes(tree: PyTree) -> int:
  """Bytes of one device's parts."""
  return sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(tree)
  )


def _lower_train(
    config: plan_config.PlanConfig, model: TransformerConfig, mesh: Mesh
) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
  run = lm_config.LmConfig(
      model=_scanned(model) if config.scan_layers else model,
      batch_size=config.batch,
      seq_len=config.seq_len,
      dtype="bfloat16",
      remat=config.remat,
      loss_piece=config.loss_piece,
      parallelism="mesh",
      fsdp=mesh.shape["fsdp"],
      tensor=mesh.shape["tensor"],
      seq=mesh.shape["seq"],
  )
  task = lm_step.make_task(run, 2, 1)
  layout = layouts.Sharded(mesh)
  state = layout.to_restore(jax.eval_shape(lambda: lm_step.init(task)))
  place = sharding.batch_sharding(mesh, 3, batch_axis=1)
  shape = (1, config.batch, config.seq_len)
  array: Callable[[Any], Any] = lambda kind: jax.ShapeDtypeStruct(
      shape, kind, sharding=place
  )
  batch = batches_lib.Batch(array(np.int32), array(np.int32), array(np.float32))
  # Parameters were drawn without the mesh, over whose positions nothing of a
  # text of two tokens could go round.
  step = layout.compiled(lm_step.train, state, True, task=task)
  parts = {
      "parameters": state.params,
      "optimizer": (state.opt_state, state.step),
      "batch": batch,
  }
  with jax.set_mesh(mesh):
    return step.lower(state, batch), parts


def _scanned(model: TransformerConfig) -> TransformerConfig:
  """The same model as one layer in a loop, where its layers are alike."""
  try:
    return dataclasses.replace(model, scan_layers=True)
  except errors.UserError:
    return model


def _lower_decode(
    config: plan_config.PlanConfig, shape: TransformerConfig, mesh: Mesh
) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
  shape = _long_enough(config, shape)
  model = models.Transformer(shape, jnp.bfloat16)
  init = model.clone(implementation="reference").init
  tokens = lambda: jnp.zeros((1, 2), jnp.int32)
  make = lambda: init(jax.random.key(0), tokens())["params"]
  params: PyTree = jax.eval_shape(make)
  params = jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
          leaf.shape, jnp.bfloat16, sharding=place
      ),
      params,
      sharding.shardings(params, mesh),
  )
  state = jax.eval_shape(lambda: _state(config, shape))
  state = jax.tree.map(lambda leaf: _placed(leaf, config, shape, mesh), state)
  with jax.set_mesh(mesh):
    lowered = decode_steps.decode_step.lower(model, params, state)
  cache, rest = state.kv_cache, dataclasses.replace(state, kv_cache=())
  return lowered, {"parameters": params, "cache": cache, "tokens": rest}


def _long_enough(
    config: plan_config.PlanConfig, shape: TransformerConfig
) -> TransformerConfig:
  """The same model, made for as many positions as the plan has tokens.

  Only what it would say of them changes, not what it costs.

  Raises:
    UserError: Its positions are rows of a table, which ends before.
  """
  if shape.positions == "learned" and config.seq_len > shape.max_len:
    raise errors.UserError(
        f"seq_len={config.seq_len} is above the {shape.max_len} positions that"
        f" shape={config.shape} has rows for: give it that or less."
    )
  longest = max(shape.max_len, config.seq_len)
  return dataclasses.replace(shape, max_len=longest)


def _state(
    config: plan_config.PlanConfig, shape: TransformerConfig
) -> decode_steps.DecodeState:
  """A state of zeros: only its shapes matter."""
  zeros = jnp.zeros(config.batch, jnp.int32)
  if config.capacity is None:
    cache = full_cache.init(shape, config.batch, config.seq_len, jnp.bfloat16)
  else:
    cache = kv_caches.init(
        policy_names.parse(config.policy),
        shape,
        config.batch,
        config.capacity,
        jnp.bfloat16,
    )
  return decode_steps.state_of(zeros, zeros, cache)


def _placed(
    leaf: jax.ShapeDtypeStruct,
    config: plan_config.PlanConfig,
    shape: TransformerConfig,
    mesh: Mesh,
) -> jax.ShapeDtypeStruct:
  spec = sharding.cache_spec(leaf.shape, mesh, config.batch, shape.num_kv_heads)
  place = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
