"""A part of a run on the devices of this process, from the last checkpoint on.

Run as
`python -m tests.joma.transformer.training.devices.elsewhere WORKDIR MESH END`,
with a mesh as `8,1,1,1`, or pmap; XLA_FLAGS says how many devices there are. It
takes steps up to END of 12 and saves. Prints a line of JSON: where it started,
digests of the parameters and moments that it found and that it left, and the
losses of all steps so far.
"""

import hashlib
import json
import pathlib
import sys
from typing import NamedTuple

import jax
import numpy as np

from joma.transformer import config as configs
from joma.transformer import sharding
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from scansnap_jax.experiment import loop
from scansnap_jax.experiment.processes import mesh_config

NUM_STEPS = 12


class _History(NamedTuple):
  losses: np.ndarray


def _task():
  model = configs.TransformerConfig(
      vocab_size=16,
      num_layers=1,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=32,
  )
  config = lm_config.LmConfig(model=model, batch_size=24, seq_len=12, lr=0.02)
  return lm_step.make_task(config, NUM_STEPS, NUM_STEPS)


def _text(steps):
  draw = np.random.default_rng(0).integers
  tokens = draw(0, 16, (NUM_STEPS, 24, 13), np.int32)[steps]
  weights = np.ones(tokens[..., 1:].shape, np.float32)
  return batches_lib.Batch(tokens[..., :-1], tokens[..., 1:], weights)


def _layout(mesh):
  if mesh == "pmap":
    return layouts.Replicated()
  _, *sizes = mesh_config.sizes_of(mesh)
  return layouts.Sharded(sharding.make_mesh(*sizes))


def _digest(layout, state):
  leaves = jax.tree.leaves(layout.gather(state))
  return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def main(workdir, mesh, end):
  """Takes the steps and prints the line."""
  task, layout = _task(), _layout(mesh)
  init = lambda: layout.init(lm_step.init, task=task)
  train = layout.map(lm_step.train, donate=True, task=task)
  empty = _History(np.full((1, NUM_STEPS), np.nan, np.float32))
  options = dict(tags={}, runs=["run"], rates="lr")
  with loop.Recorder(pathlib.Path(workdir), "lm", **options) as recorder:
    template = layout.to_restore(jax.eval_shape(init))
    start, saved, history = recorder.resume(template, empty)
    state = layout.from_saved(saved) if start else init()
    found = _digest(layout, state)
    state, losses = train(state, _text(slice(start, end)))
    history.losses[0, start:end] = layout.gather(losses)
    left = _digest(layout, state)
    schedule = loop.Schedule(
        num_steps=NUM_STEPS, log_every=end - start, checkpoint_every=1
    )
    interval = next(iter(schedule.intervals(start)))
    recorder.save(interval, layout.to_save(state), history, np.array([True]))
  line = {"start": start, "devices": jax.device_count()}
  line |= {"found": found, "left": left}
  line["losses"] = history.losses[0, :end].tolist()
  print(json.dumps(line))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
