"""What a study is: its settings, its measurement, its figure, its caption.

Every file below `joma/studies` defines one, `STUDY`. Command lines import all
of them for their flags, so that a study imports jax and whatever needs it
lazily, and so does matplotlib: a module is loaded when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import pathlib
import types
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

from etils import epy

with epy.lazy_imports():
  import jaxtyping
  from matplotlib import figure as mpl_figure
  import numpy as np

  from joma.studies import parts
  from scansnap_jax.experiment import errors
  from scansnap_jax.experiment import metric_stream
  from scansnap_jax.experiment.processes import devices

Summary = Mapping[str, Any]
# Takes a step and its metrics by name.
OnMetrics = Callable[[int, dict[str, Any]], None]
BANDS = "Lines and bands: mean over seeds and its 95 % interval (Student's t)."


class Study(NamedTuple):
  """What a study is made of.

  Attributes:
    title: Heading of its section in the report.
    config: Settings by default: a frozen dataclass.
    measure: Settings and the run's folder, where metrics.jsonl and checkpoints
      go, to the summary: every number that the figure shows, and `finding`.
    draw: Summary, as measured or as read back from summary.json, to figure. It
      writes nothing.
    caption: What the figure shows.
    report_title: Heading of the report.
    smoke: Settings in place of those by default, with which all of it runs in
      seconds; what comes out means nothing.
  """

  title: str
  config: Any
  measure: Callable[[Any, pathlib.Path], dict[str, Any]]
  draw: Callable[[Summary], mpl_figure.Figure]
  caption: str
  report_title: str = "JoMA: joint dynamics of MLP and attention"
  smoke: Mapping[str, Any] = types.MappingProxyType({})


def streamed(
    name: str, measure: Callable[..., dict[str, Any]]
) -> Callable[[Any, pathlib.Path], dict[str, Any]]:
  """Lets a measurement of a minute or so write its rows to metrics.jsonl.

  Args:
    name: Name of the study, which tags the rows.
    measure: Takes the settings and `on_metrics`; it starts anew every time.
  """
  return functools.partial(_stream, name, measure)


def _stream(
    name: str,
    measure: Callable[..., dict[str, Any]],
    config: Any,
    workdir: pathlib.Path,
) -> dict[str, Any]:
  if not devices.is_main_process():
    return measure(config)
  with metric_stream.MetricStream(
      workdir / "metrics.jsonl", resume_below=None, tags={"experiment": name}
  ) as stream:
    return measure(config, on_metrics=stream.write)


def in_parts(
    name: str, measure: Callable[..., dict[str, Any]]
) -> Callable[[Any, pathlib.Path], dict[str, Any]]:
  """Lets a measurement of minutes keep its parts, to go on from them.

  Args:
    name: Name of the study, which tags its rows in metrics.jsonl.
    measure: Takes the settings and a `parts.Part`.
  """
  return functools.partial(_in_parts, name, measure)


def _in_parts(
    name: str,
    measure: Callable[..., dict[str, Any]],
    config: Any,
    workdir: pathlib.Path,
) -> dict[str, Any]:
  return parts.measure(name, measure, config, workdir)


def emit(
    on_metrics: OnMetrics | None,
    steps: Iterable[SupportsIndex],
    curves: Mapping[str, jaxtyping.Shaped[Any, "S"] | Sequence[SupportsFloat]],
) -> None:
  """Streams curves, one row a time.

  Args:
    on_metrics: Takes the rows; None where nobody listens.
    steps: Of the rows [S].
    curves: By name.

  Raises:
    UserError: A curve is NaN or infinite somewhere: training diverged.
  """
  for name, curve in curves.items():
    is_good = np.isfinite(np.asarray(curve, np.float64))
    if not is_good.all():
      step = [*steps][int(np.argmin(is_good))]
      raise errors.UserError(
          f"training diverged: {name} is NaN or infinite at step {step}. Use"
          " smaller steps, in a new workdir."
      )
  if on_metrics is None:
    return
  for i, step in enumerate(steps):
    on_metrics(int(step), {name: curve[i] for name, curve in curves.items()})
