"""A recording as a page, in a file or in a notebook, and in a sentence."""

import dataclasses
import html
import os
import pathlib

from joma.inference.explore import document
from joma.inference.explore import recording
from joma.systems.probes import maps
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir


@dataclasses.dataclass(frozen=True)
class View:
  """A page; notebooks show it where it is the last value of a cell.

  Attributes:
    recording: All numbers of it.
    facts: What the page says of the run.
    max_mb: Its size at most, about.
  """

  recording: recording.Recording
  facts: dict[str, str]
  max_mb: float = 18.0

  def html(self) -> str:
    """Returns the page."""
    return document.render(self.recording, self.facts, self.max_mb)

  def write(self, path: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the page and returns its path."""
    out = json_file.local_path(path)
    workdir.write_atomic(out, self.html())
    return out

  def _repr_html_(self) -> str:
    """A frame of its own: the notebook's style does not reach the page."""
    return (
        '<iframe sandbox="allow-scripts" style="width:100%;height:56rem;'
        f'border:0" title="{html.escape(self.recording.model)}: attention and'
        f' evictions" srcdoc="{html.escape(self.html())}"></iframe>'
    )


def of_recording(found: recording.Recording, max_mb: float = 18.0) -> View:
  """Returns the page of a recording, with what it says of itself."""
  return View(found, facts_of(found), max_mb)


def facts_of(found: recording.Recording) -> dict[str, str]:
  """Returns what the page says of its run."""
  num_layers, num_heads, num_tokens = found.attention.received.shape
  new = num_tokens - found.num_prompt
  facts = {
      "model": f"{found.model}: {num_layers} layers, {num_heads} heads",
      "text": (
          f"{found.num_prompt} tokens"
          + (f", and {new} that the model adds" if new else "")
      ),
  }
  if found.policies:
    how = {
        "prompt": "the text at once, then each new token as a decode step",
        "tokens": "token by token, each one a decode step",
    }[found.reading]
    slots = found.policies[0].slots
    facts["policies"] = f"{slots} slots of each KV head; read {how}"
  return facts


def finding(found: recording.Recording) -> str:
  """Says in a sentence what each policy keeps, or what heads do."""
  attention = found.attention
  if not found.policies:
    sinks = (attention.sink_mass > maps.SINK_THRESHOLD).mean()
    return (
        f"{found.model}: entropy {attention.entropy.mean():.2f} nats, mean over"
        f" heads; in {100 * sinks:.0f} % of them the first token has more than"
        f" {100 * maps.SINK_THRESHOLD:.0f} % of the attention."
    )
  shares = found.mean_shares()
  mean = lambda losses: float(losses[found.first_step() : -1].mean())
  said = [
      f"{one.label} keeps"
      f" {100 * shares[i].mean():.1f} % of attention"
      f" (loss {mean(one.losses):.3f} nats)"
      for i, one in enumerate(found.policies)
  ]
  return (
      f"With {found.policies[0].slots} slots {', '.join(said)}; with all keys"
      f" the loss is {mean(found.losses):.3f}."
  )
