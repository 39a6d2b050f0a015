"""The rungs between Scan & Snap's data and a Transformer on text."""

from typing import NamedTuple


class Rung(NamedTuple):
  """What is trained on what, and who asks.

  Attributes:
    name: What it changes.
    after: The rung that it differs from by this alone; empty for the first.
    data: classes, bigrams (a text's, contexts resampled) or text.
    num_next: Next tokens of a query, the most frequent ones; 0 for all.
    is_every_query: Contexts are asked by queries drawn from all, in place of
      their own.
    has_residual: The query itself reaches the output.
    embeddings: free, frozen, untied or tied.
    has_mlp: There is an MLP.
    optimizer: sgd, momentum, adam or sign.
    rate: Of all but attention, whose rate is a tenth.
    is_decoder_first: Attention is held still for the first half of the steps.
  """

  name: str
  after: str
  data: str = "text"
  num_next: int = 0
  is_every_query: bool = True
  has_residual: bool = False
  embeddings: str = "free"
  has_mlp: bool = False
  optimizer: str = "sgd"
  rate: float = 5.0
  is_decoder_first: bool = False


_FIRST = Rung(
    "Scan & Snap", "", data="classes", num_next=2, is_every_query=False
)
_TWO = _FIRST._replace(name="2 next tokens", data="bigrams")
_ALL = _TWO._replace(name="all next tokens", num_next=0)
_TEXT = _ALL._replace(name="text", data="text")
_EVERY = _TEXT._replace(name="every query", is_every_query=True)
_RESIDUAL = _EVERY._replace(name="residual", has_residual=True)
# Embeddings of unit length, which products of matrices move faster.
_FROZEN = _RESIDUAL._replace(name="frozen", embeddings="frozen", rate=0.25)
_UNTIED = _FROZEN._replace(name="untied", embeddings="untied")
_TIED = _UNTIED._replace(name="tied", embeddings="tied")
_MLP = _TIED._replace(name="MLP", has_mlp=True)

LADDER = (
    _FIRST,
    _TWO._replace(after="Scan & Snap"),
    _ALL._replace(after="2 next tokens"),
    _TEXT._replace(after="all next tokens"),
    _EVERY._replace(after="text"),
    _RESIDUAL._replace(after="every query"),
    _FROZEN._replace(after="residual"),
    _UNTIED._replace(after="frozen"),
    _TIED._replace(after="untied"),
    _MLP._replace(after="tied"),
)


def _other(rung: Rung, label: str, optimizer: str, rate: float) -> Rung:
  """The same with another optimizer."""
  return rung._replace(
      name=f"{rung.name}, {label}",
      after=rung.name,
      optimizer=optimizer,
      rate=rate,
  )


OPTIMIZERS = (
    _other(_FIRST, "Adam", "adam", 0.1),
    _other(_FIRST, "sign", "sign", 0.1),
    _other(_ALL, "Adam", "adam", 0.03),
    _other(_EVERY, "Adam", "adam", 0.03),
    _other(_EVERY, "sign", "sign", 0.003),
    _other(_MLP, "momentum", "momentum", 0.025),
    _other(_MLP, "Adam", "adam", 0.003),
    _other(_MLP, "sign", "sign", 0.001),
)
# Whether a rung fails because little was learned, or because attention did not
# wait for the decoder, as the theory has it.
CONTROLS = (
    _FROZEN._replace(name="frozen, faster", after="frozen", rate=20.0),
    _EVERY._replace(
        name="every query, decoder first",
        after="every query",
        is_decoder_first=True,
    ),
    _RESIDUAL._replace(
        name="residual, decoder first",
        after="residual",
        is_decoder_first=True,
    ),
)
RUNGS = LADDER + OPTIMIZERS + CONTROLS
