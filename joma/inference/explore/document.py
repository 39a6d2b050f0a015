"""A recording as one page of HTML, which needs nothing else.

The files of `page/` are put together as they are; its content security policy
forbids the browser to load anything.
"""

from collections.abc import Mapping
import html
import importlib.resources
import json
import math
import re
from typing import Any

import numpy as np

from joma.inference.explore import levels
from joma.inference.explore import recording
from joma.inference.explore import streams as streams_lib

_FOLDER = importlib.resources.files("joma.inference.explore") / "page"
_PLACE = re.compile("@@([a-z]+)@@")
_SCRIPTS = (
    *("streams.js", "maps.js", "heads.js", "tokens.js", "words.js"),
    *("controls.js", "page.js"),
)


def render(
    found: recording.Recording,
    facts: Mapping[str, str],
    max_mb: float = 18.0,
) -> str:
  """Returns the page.

  Args:
    found: What was measured of a text.
    facts: What the page says of the run; every text is escaped.
    max_mb: Of the page, about; small weights are left out if need be.
  """
  streams = streams_lib.pack(found, 1e6 * max_mb)
  title = f"What {found.model} attends to"
  if found.policies:
    title += f", and what {_listed([p.label for p in found.policies])} keep"
    title += "s" if len(found.policies) == 1 else ""
  parts = {
      "title": html.escape(title),
      "style": _file("page.css"),
      "script": "\n".join(map(_file, _SCRIPTS)),
      "facts": "".join(
          f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
          for name, value in facts.items()
      ),
      "header": _embedded(_header(found, streams)),
      "streams": "\n".join(_elements(streams)),
  }
  # In one pass: what a text says is no place for anything.
  return _PLACE.sub(lambda place: parts[place[1]], _file("page.html"))


def _listed(names: list[str]) -> str:
  return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _file(name: str) -> str:
  return (_FOLDER / name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
  """JSON that ends no script element."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  return text.replace("<", "\\u003c")


def _elements(streams: streams_lib.Streams) -> list[str]:
  """One element a stream: browsers read text of a script that is none fast."""
  named = {"pictures": streams.pictures}
  named |= {f"left-{i}": text for i, text in enumerate(streams.left_at)}
  named |= {f"head-{i}": text for i, text in enumerate(streams.heads)}
  return [
      f'<script type="text/plain" id="{name}">{text}</script>'
      for name, text in named.items()
  ]


def _header(
    found: recording.Recording, streams: streams_lib.Streams
) -> dict[str, Any]:
  """What the page knows before it opens a stream."""
  attention = found.attention
  num_layers, num_heads, num_tokens = attention.received.shape
  return {
      "model": found.model,
      "pieces": found.pieces,
      "num_prompt": found.num_prompt,
      "first_step": found.first_step(),
      "num_layers": num_layers,
      "num_heads": num_heads,
      "num_tokens": num_tokens,
      "num_entries": streams.num_entries,
      "least_level": streams.least_level,
      "steps_per_octave": levels.STEPS_PER_OCTAVE,
      "width": streams.width,
      "losses": _numbers(found.losses),
      "heads": {
          "entropy": _numbers(attention.entropy),
          "sink": _numbers(attention.sink_mass),
          "induction": _numbers(attention.induction),
      },
      "policies": [
          {
              "name": policy.name,
              "label": policy.label,
              "slots": policy.slots,
              "num_kv_heads": policy.left_at.shape[1],
              "losses": _numbers(policy.losses),
              "shares": _numbers(found.mean_shares()[i]),
          }
          for i, policy in enumerate(found.policies)
      ],
  }


def _numbers(values: np.ndarray) -> list[float | None]:
  """Four digits of each, in one list; NaN is null."""
  return [
      None if math.isnan(value) else float(f"{value:.4g}")
      for value in np.asarray(values, np.float64).ravel()
  ]
