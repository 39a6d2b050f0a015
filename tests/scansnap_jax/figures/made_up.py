"""Made-up results to draw, and what is read off a drawn figure."""

import functools
import itertools

import numpy as np

from scansnap_jax import config as config_lib
from scansnap_jax import data
from scansnap_jax import run as run_lib
from scansnap_jax import train

# Float32 against float64: ten times the largest error seen.
RTOL = 2e-5
SEEDS = (7, 3, 5)

# A figure that depends on nothing, drawn once.
drawn = functools.cache(lambda draw: draw())


def result(
    num_last=2,
    num_next_per_last=1,
    lr_z=(1.0,),
    lr_ratio=(1.0,),
    seeds=SEEDS,
    steps=(0, 2, 3, 4, 6, 8, 10, 12, 20),
    record=True,
):
  """A result with the right shapes and P(l|n), and made-up curves."""
  classes = data.make_classes(
      config_lib.DataConfig(num_next_per_last=num_next_per_last), num_last
  )
  runs = [*itertools.product(seeds, lr_z, lr_ratio)]
  seed, z, ratio = (np.array(axis) for axis in zip(*runs, strict=True))
  random = np.random.default_rng(0)
  shape = (len(runs), len(steps) if record else 1, *classes.probs.shape)
  attended = classes.probs * random.gamma(2.0, size=shape)
  attended /= attended.sum(axis=-1, keepdims=True)
  curve = lambda low, high, num: random.uniform(low, high, (len(runs), num))
  history = train.History(
      losses=curve(1e-5, 1, steps[-1]).astype(np.float32),
      distinct_entropy=curve(1.5, 2.1, len(steps)).astype(np.float32),
      common_mass=curve(0.3, 0.6, len(steps)).astype(np.float32),
      attended=attended.astype(np.float32),
  )
  return train.Result(
      num_last=num_last,
      classes=classes,
      runs=run_lib.SweepRun(
          seed=seed.astype(np.uint32),
          stream=np.searchsorted(np.sort(seeds), seed).astype(np.int32),
          lr_z=z,
          lr_ratio=ratio,
      ),
      steps=np.array(steps),
      history=history,
      params={},
  )


def medium(num_last, lr_z=(0.5, 1.0), lr_ratio=(1.0, 2.0, 5.0), seeds=SEEDS):
  return result(num_last, 2, lr_z, lr_ratio, seeds, (0, 20), record=False)


def lines(axes, label):
  return [line for line in axes.lines if line.get_label() == label]


def line(axes, label):
  (line,) = lines(axes, label)
  return line.get_xdata(), np.asarray(line.get_ydata())


def bars(axes, look, is_open):
  """Points (x, mean, spread) of a curve with error bars."""
  (bar,) = [
      bar
      for bar in axes.containers
      if bar.lines[0].get_marker() == look.marker
      and (bar.lines[0].get_markerfacecolor() == "white") == is_open
  ]
  points, _, (segments,) = bar.lines
  ends = np.array(segments.get_segments())
  spread = (ends[:, 1, 1] - ends[:, 0, 1]) / 2
  return points.get_xdata(), points.get_ydata(), spread


def heat_maps(figure):
  return [
      axes
      for axes in figure.axes
      if axes.images and axes.get_label() != "<colorbar>"
  ]


def panel(figure, title):
  (axes,) = [axes for axes in figure.axes if axes.get_title() == title]
  return axes
