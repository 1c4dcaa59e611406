"""`spikes.jsonl` of the run directory: the spikes that the guard found. Rank 0 appends to it; the controller copies it to its event log.

The samples of spikes that were rolled back are excluded from then on, as if the config's `data.skip` had named them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from manta.cluster.protocol import open_regular, read_lines

Kind = Literal["spike", "not-finite"]
Action = Literal["report", "skip", "rollback", "stop"]
Number = Annotated[int, Field(ge=0, le=2**40)]
Ranges = tuple[tuple[Number, Number], ...]
"""Of sample numbers: [first, end) each."""


def _check(samples: Ranges) -> Ranges:
    if any(first >= end for first, end in samples):
        raise ValueError("expected ranges [first, end) with samples, got an empty one")
    return samples


class SpikeError(RuntimeError):
    """A step's samples are recorded as excluded: training continues from the last checkpoint, without them."""


class Document(BaseModel, frozen=True):
    """A part of a document in a sample."""

    source: str
    location: str | None
    """Its file, and the line or row there; None if the corpus does not record it."""
    tokens: Number


class SampleLoss(BaseModel, frozen=True):
    sample: Number
    loss: float | None
    """The mean of its targets; None if it is not finite."""
    documents: tuple[Document, ...] = ()


class Spike(BaseModel):
    """A step with a loss or gradient norm above the guard's limit, or not finite."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: float = Field(ge=0, le=1e12)
    event: Kind
    attempt: Number
    step: Number
    """Counted from 1, as in metrics.jsonl."""
    message: str
    action: Action
    loss: float | None
    grad_norm: float | None
    loss_limit: float | None
    grad_norm_limit: float | None
    samples: Annotated[Ranges, AfterValidator(_check)]
    """All samples of the step."""
    worst: tuple[SampleLoss, ...] = ()
    """Those with the highest losses, and their text."""


_SPIKE = TypeAdapter(Spike)


def read_spikes(path: Path) -> list[Spike]:
    """Return the spikes of a run so far, in order. Raises OSError if the file cannot be read. Damaged lines are skipped and logged."""
    try:
        with open_regular(path) as file:
            return list(read_lines(file, _SPIKE.validate_json, path=path))
    except FileNotFoundError:
        return []


def rolled_back(spikes: Sequence[Spike]) -> Ranges:
    """Return the samples that are excluded because of them."""
    return tuple(samples for spike in spikes if spike.action == "rollback" for samples in spike.samples)
