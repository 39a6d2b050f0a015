"""Runs of language models that were never trained: curves of known shape."""

import numpy as np

from joma.transformer.training import summary

HEADER = (
    "nlayers,lr,seed,minibatch,val_loss,attn_entropy_layer0,attn_entropy_layer1"
)


def make_rows(
    *, num_layers=2, seed=1, steps=range(0, 2001, 100), with_chunk=False
):
  """Metrics with an entropy that falls by 1 until 1000 and rises by half."""
  rows = []
  for step in steps:
    row = {"step": step, "tokens_per_sec": 1000.0}
    dip = (step / 1000 - 1) ** 2 * (1 if step < 1000 else 0.5)
    for layer in range(num_layers):
      row[f"entropy/layer_{layer}"] = 1.5 + 0.2 * layer + dip + 0.1 * seed
      if with_chunk:
        row[f"chunk_entropy/layer_{layer}"] = 1.25 + dip
      row[f"sink_rate/layer_{layer}"] = 0.1 * layer
      row[f"effective_support/layer_{layer}"] = 5.0
      row[f"stable_rank/layer_{layer}"] = 20.0 - layer
    if step:
      row["train_loss"] = 6 - step / 1000
    if step % 500 == 0:
      row["valid_loss"] = 6.5 - step / 1000 + 0.25 * seed
    rows.append(row)
  return rows


def make_run(*, lr=1e-4, seed=1, num_layers=2, **kwargs):
  """The summary of such a run."""
  about = {
      "preset": "joma_figure6",
      "corpus": "wikitext2",
      "optimizer": "adam",
      "num_layers": num_layers,
      "lr": lr,
      "seq_len": 35,
      "seed": seed,
  }
  rows = make_rows(num_layers=num_layers, seed=seed, **kwargs)
  return summary.summarize_run(rows, about)


def write_reference(
    path, *, seeds=(1, 2, 3), minibatches=(0, 1000, 2000, 3000)
):
  """Writes curves at rate 1e-4: losses from 7 + seed down, for two layers."""
  lines = [HEADER]
  for seed in seeds:
    for i, minibatch in enumerate(minibatches):
      lines.append(
          f"2,0.0001,{seed},{minibatch},{7 + seed - i},{2 - i / 4},1.75"
      )
      lines.append(f"1,0.0001,{seed},{minibatch},{8 + seed - i},{2 - i / 4},")
  path.write_text("\n".join(lines) + "\n")


def make_maps(num_maps=4, num_layers=2, num_heads=1, seq_len=6):
  """Uniform causal attention, which becomes attention to oneself."""
  uniform = np.tril(np.ones((seq_len, seq_len)))
  uniform /= uniform.sum(axis=1, keepdims=True)
  share = np.linspace(0, 1, num_maps)[:, None, None]
  maps = (1 - share) * uniform + share * np.eye(seq_len)
  return np.broadcast_to(
      maps[:, None, None], (num_maps, num_layers, num_heads, seq_len, seq_len)
  ).astype(np.float32)
