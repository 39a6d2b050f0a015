"""A program of eight devices: fifty steps on each mesh, beside one device.

Run as `python -m tests.joma.transformer.training.devices.on_eight [MESH...]`,
with meshes as `1x2x2x2`, or `1x2x2x2/12` for logits of 12 positions at a time;
prints a line of JSON for each layout: its losses.
"""

import json
import sys

import jax
import numpy as np

from joma.transformer import config as configs
from joma.transformer import sharding
from joma.transformer.text import batches as batches_lib
from joma.transformer.training import layouts
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step

MESHES = (
    *("8x1x1x1", "2x4x1x1", "2x2x2x1", "1x2x2x2", "1x1x1x8", "2x1x1x4"),
    "1x2x1x4/12",
)
_NUM_STEPS = 50


def _task(loss_piece=None):
  # Grouped heads, and every other layer sees a window.
  model = configs.TransformerConfig(
      vocab_size=16,
      num_layers=2,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=32,
      windows=(0, 5),
  )
  config = lm_config.LmConfig(
      model=model,
      batch_size=8,
      seq_len=32,
      lr=0.01,
      warmup_steps=5,
      loss_piece=loss_piece,
  )
  return lm_step.make_task(config, _NUM_STEPS, _NUM_STEPS)


def _text():
  """Each token is the one before it plus 3, or plus 5 now and then."""
  rng = np.random.default_rng(0)
  shape = (_NUM_STEPS, 8, 33)
  steps = rng.choice([3, 5], shape, p=[0.9, 0.1])
  tokens = (np.cumsum(steps, axis=-1) % 16).astype(np.int32)
  weights = np.ones((_NUM_STEPS, 8, 32), np.float32)
  weights[:, 3, 20:] = 0  # Padding.
  return batches_lib.Batch(tokens[..., :-1], tokens[..., 1:], weights)


def _layouts(meshes):
  yield "one", layouts.Replicated(jax.devices()[:1])
  yield "pmap", layouts.Replicated()
  for name in meshes:
    _, fsdp, tensor, seq = map(int, name.partition("/")[0].split("x"))
    yield name, layouts.Sharded(sharding.make_mesh(fsdp, tensor, seq))


def main(meshes):
  """Prints the lines."""
  text = _text()
  for name, layout in _layouts(meshes or MESHES):
    piece = name.partition("/")[2]
    task = _task(int(piece) if piece else None)
    train = layout.map(lm_step.train, donate=True, task=task)
    _, losses = train(layout.init(lm_step.init, task=task), text)
    losses = np.ravel(layout.gather(losses)).tolist()
    print(json.dumps({"layout": name, "losses": losses}), flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
