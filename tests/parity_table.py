"""`make parity`: each model under each layout of at most four ranks in each precision. Writes docs/parity.md; exits 1 where a cell fails.

A name or more on the command line runs those models alone and writes nothing.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from parity import BOUNDS, MODELS, OPTIMIZERS, Cell, Trace, plain_all, under, under_all
from spmd import spmd

from manta.trainer.config import ParallelConfig, Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16-autocast", "bf16", "fp16")
SHARES = [
    (1, {}),
    (2, {}),
    (4, {}),
    (2, {"tensor": 2}),
    (4, {"tensor": 2}),
    (4, {"tensor": 4}),
    (2, {"sequence": 2}),
    (4, {"sequence": 2}),
    (4, {"sequence": 4}),
    (2, {"expert": 2}),
    (4, {"expert": 2}),
    (4, {"expert": 4}),
    (4, {"tensor": 2, "sequence": 2}),
    (4, {"tensor": 2, "expert": 2}),
    (4, {"sequence": 2, "expert": 2}),
    (4, {"sequence": 2, "expert": 4}),
]
# On top of each: ZeRO's stages; where two ranks are all there are, offloading and recomputation too.
STAGES = [(stage, False, "none") for stage in (0, 1, 2, 3)]
MORE = [(stage, True, "none") for stage in (1, 2, 3)] + [(1, False, "selective"), (3, False, "full")]
DOCUMENT = Path(__file__).parents[1] / "docs/parity.md"


def cells(model: str) -> list[Cell]:
    return [
        Cell(model, ranks, precision, ParallelConfig(**shares, zero=stage, offload=offload), recompute)
        for ranks, shares in SHARES
        for stage, offload, recompute in STAGES + (MORE if ranks == 2 else [])
        for precision in PRECISIONS
    ]


def measure(model: str) -> Iterator[tuple[Cell, str | dict[str, Trace]]]:
    """Of each cell its traces, or why it failed to give any."""
    allowed = [cell for cell in cells(model) if cell.refusal is None]
    for ranks in (1, 2, 4):
        here = [cell for cell in allowed if cell.ranks == ranks]
        for first in range(0, len(here), 12):  # in the same processes: forks and rendezvous cost as much as a cell
            some = here[first : first + 12]
            try:
                yield from zip(some, spmd(under_all, ranks, some, timeout=600.0)[0], strict=True)
            except AssertionError:
                for cell in some:
                    try:
                        yield cell, spmd(under_all, ranks, [cell], timeout=120.0)[0][0]
                    except AssertionError as error:
                        yield cell, str(error).strip().splitlines()[-1]


def layout_name(cell: Cell) -> str:
    parallel = cell.parallel
    shares = [f"{name} {size}" for name in ("tensor", "sequence", "expert") if (size := getattr(parallel, name)) > 1]
    data = cell.ranks // (parallel.tensor * parallel.sequence)
    extra = [*(["offload"] if parallel.offload else []), *([] if cell.recompute == "none" else [f"recompute {cell.recompute}"])]
    return ", ".join([*([f"data {data}"] if data > 1 or not shares else []), *shares, f"ZeRO-{parallel.zero}", *extra])


def main() -> int:
    began = time.monotonic()
    names = sys.argv[1:] or list(MODELS)
    controls = control_table()
    wrong = [line for line in controls if "NOT NOTICED" in line]
    sections, reasons, count = [], {}, 0
    for model in names:
        references = spmd(plain_all, 1, [(model, precision) for precision in PRECISIONS], timeout=300.0)[0]
        shown: dict[Cell, str] = {}
        for cell, result in measure(model):
            if isinstance(result, str):
                wrong.append(f"{cell}: {result}")
                shown[cell] = "FAILED"
            else:
                pairs = [result[optimizer].differs(references[model, cell.precision, optimizer]) for optimizer in OPTIMIZERS]
                loss, norm = (max(values) for values in zip(*pairs, strict=True))
                shown[cell] = f"{loss:.0e} / {norm:.0e}"
                if not (loss <= BOUNDS[cell.precision][0] and norm <= BOUNDS[cell.precision][1]):
                    wrong.append(f"{cell}: {pairs}")
                    shown[cell] += " WRONG"
            print(f"{cell}: {shown[cell]}", flush=True)
        count += len(shown)
        rows: dict[str, list[str]] = {}
        for cell in cells(model):
            row = rows.setdefault(layout_name(cell), [])
            row.append(f"[{reasons.setdefault(cell.refusal, len(reasons) + 1)}]" if cell.refusal else shown[cell])
        sections.append(f"## {model}\n\n| layout | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}\n")
        sections += [f"| {name} | {' | '.join(row)} |\n" for name, row in rows.items() if len(set(row)) > 1 or not row[0].startswith("[")]
        sections.append("\n")
    for line in wrong:
        print(f"WRONG {line}", flush=True)
    if not sys.argv[1:]:
        write(sections, reasons, controls, count, time.monotonic() - began)
    return 1 if wrong else 0


def control_table() -> list[str]:
    """Known-bad runs, which the comparison must notice."""
    lines = []
    for precision, optimizer in itertools.product(("fp32", "bf16"), OPTIMIZERS):
        reference = spmd(plain_all, 1, [("llama", precision)])[0]["llama", precision, optimizer]
        faults = ["a gradient doubled", "the reduction left out"]
        for fault in faults:
            trace = spmd(under, 2, Cell("llama", 2, precision), optimizer, fault)[0]
            lines.append(control_line(f"{fault}, {precision}, {optimizer}", trace, reference, precision))
    reference = spmd(plain_all, 1, [("llama", "bf16")])[0]["llama", "bf16", "adamw"]
    trace = spmd(under, 2, Cell("llama", 2, "bf16", ParallelConfig(zero=0)), "adamw")[0]
    lines.append(control_line("ZeRO-0 in bf16, adamw", trace, reference, "bf16"))
    return lines


def control_line(name: str, trace: Trace, reference: Trace, precision: Precision) -> str:
    loss, norm = trace.differs(reference)
    noticed = loss > BOUNDS[precision][0] or norm > BOUNDS[precision][1]
    return f"| {name} | {loss:.0e} / {norm:.0e} | {'noticed' if noticed else 'NOT NOTICED'} |\n"


def write(sections: list[str], reasons: dict[str, int], controls: list[str], count: int, seconds: float) -> None:
    bounds = "; ".join(f"{precision} {loss:.0e} and {norm:.0e}" for precision, (loss, norm) in BOUNDS.items())
    text = f"""# Parity

What a model computes under a layout, against one plain PyTorch process (no DeepSpeed) of the same precision, fp32 masters included. Ten
optimizer steps under AdamW and under SGD, every gradient clipped, gradients accumulated over at least two micro batches, padding that
differs between ranks and micro batches, dropout on where the model has it. A cell shows the largest relative difference of the loss, and of
the gradient norm, over all steps of both optimizers. Written by `make parity`: {count} cells in {seconds / 60:.0f} minutes on two cores.

Bounds, of loss and of norm: {bounds}.

Controls, which must not pass:

| fault put in | loss / norm | |
|---|---|---|
{"".join(controls)}
{"".join(sections)}What is refused, and why:

"""
    text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
