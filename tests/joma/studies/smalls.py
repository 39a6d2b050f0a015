"""What small studies have in common: measured in a folder, drawn, read."""

import dataclasses
import json
import pathlib
import tempfile

from scansnap_jax.experiment import figures


def measured(study, changes):
  """The summary of a study with other settings, as it is read back."""
  config = dataclasses.replace(study.config, **changes)
  with tempfile.TemporaryDirectory() as folder:
    summary = study.measure(config, pathlib.Path(folder))
  to_list = lambda x: x.tolist()
  return json.loads(json.dumps(summary, default=to_list, allow_nan=False))


def drawn(study, summary):
  """The figure of a summary, and all that it says."""
  figure = study.draw(summary)
  with figures.style():
    figure.draw_without_rendering()
  texts = []
  for axes in figure.axes:
    texts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    texts += axes.get_legend_handles_labels()[1]
  return figure, texts
