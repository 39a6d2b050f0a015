"""Settings of the inspection of models."""

import dataclasses

from joma.systems.probes import names
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectionConfig:
  """What models read.

  Attributes:
    text: Text file, UTF-8, encoded by the model's tokenizer.json.
    ids: File .npz with an array ids [B, T] of token ids, instead of a text.
    logits_out: File .npy to write the logits of a single model to, float32
      [B, T, V]; a text is B = 1.
    window: Tokens that are read at once; longer texts are cut, and each window
      starts at position 0. None is all of ids and 512 of a text, as far as the
      model's positions reach.
    max_windows: Windows of a text that are read; 0 is all.
    attention: Systems laid over the models, without parameters of their own, as
      in TransformerConfig: hip:k=512, one entry a layer, or a pattern. Empty
      leaves the models as they are.
    probes: Probes by name, each a column of the report's tables: sinks,
      sink_of_means, secondary_sinks, concentration, diversity, local, and
      update_rank, which compares models with the first.
  """

  text: str | None = None
  ids: str | None = None
  logits_out: str | None = None
  window: int | None = None
  max_windows: int = 16
  attention: tuple[str, ...] = ()
  probes: tuple[str, ...] = ()

  def __post_init__(self):
    if self.window is not None:
      require.at_least("window", self.window, 1)
    require.at_least("max_windows", self.max_windows, 0)
    names.check(self.probes)
    if self.text is not None and self.ids is not None:
      raise UserError("give one of text and ids, not both.")
    if self.logits_out is not None and not self.logits_out.endswith(".npy"):
      raise UserError(f"logits_out={self.logits_out} must end in .npy.")
