"""`make parity`: each model under each layout of at most four ranks in each precision. Writes docs/parity.md; exits 1 where a cell fails.

A name or more on the command line runs those models alone and writes nothing.
"""

import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parity import BOUNDS, MODELS, OPTIMIZERS, TURNS, Cell, Trace, plain_all, under, under_all
from spmd import spmd

from manta.trainer.config import ParallelConfig, Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16-autocast", "bf16", "fp16", "fp8")
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
MORE = [(stage, True, "none") for stage in (1, 2, 3)] + [(1, False, "selective"), (3, False, "selective"), (3, False, "full")]
LOT = 8
DOCUMENT = Path(__file__).parents[1] / "docs/parity.md"


def cells(model: str) -> list[Cell]:
    return [
        Cell(model, ranks, precision, ParallelConfig(**shares, zero=stage, offload=offload), recompute)
        for ranks, shares in SHARES
        for stage, offload, recompute in STAGES + (MORE if ranks == 2 else [])
        for precision in PRECISIONS
    ]


Result = str | dict[str, Trace]  # or why there is none


def measure(model: str) -> Iterator[tuple[Cell, Result]]:
    """Each allowed cell. Two lots at a time: ranks wait for each other half of the time."""
    allowed = [cell for cell in cells(model) if cell.refusal is None]
    by_ranks = [[cell for cell in allowed if cell.ranks == ranks] for ranks in (1, 2, 4)]
    lots = [here[first : first + LOT] for here in by_ranks for first in range(0, len(here), LOT)]
    with ThreadPoolExecutor(2) as pool:
        for some, results in zip(lots, pool.map(measured, lots), strict=True):
            yield from zip(some, results, strict=True)


def measured(some: list[Cell]) -> list[Result]:
    """In the same processes: forks and rendezvous cost as much as a cell. Where one cell of them fails, each is measured alone."""
    try:
        return spmd(under_all, some[0].ranks, some, timeout=600.0)[0]
    except AssertionError as error:
        if len(some) == 1:
            return [str(error).strip().splitlines()[-1]]
        return [result for cell in some for result in measured([cell])]


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
    floors = [f"| | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}\n"]
    for model in names:
        columns = [(model, precision) for precision in PRECISIONS]
        references, again = (spmd(plain_all, 1, columns, turns, timeout=600.0)[0] for turns in (TURNS, 2 * TURNS))
        floors.append(f"| {model} | {' | '.join(in_words(*apart(again, references, *column)) for column in columns)} |\n")
        shown: dict[Cell, str] = {}
        for cell, result in measure(model):
            if isinstance(result, str):
                wrong.append(f"{cell}: {result}")
                shown[cell] = "FAILED"
            else:
                traces = {(model, cell.precision, optimizer): trace for optimizer, trace in result.items()}
                loss, norm = apart(traces, references, model, cell.precision)
                shown[cell] = in_words(loss, norm)
                if not (loss <= BOUNDS[cell.precision][0] and norm <= BOUNDS[cell.precision][1]):
                    wrong.append(f"{cell}: loss {loss}, norm {norm}")
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
        write(sections, reasons, controls, floors, count, time.monotonic() - began)
    return 1 if wrong else 0


Traces = dict[tuple[str, Precision, str], Trace]


def apart(ours: Traces, theirs: Traces, model: str, precision: Precision) -> tuple[float, float]:
    """The largest relative difference of loss and of norm, under either optimizer."""
    loss, norm = zip(
        *(ours[model, precision, optimizer].differs(theirs[model, precision, optimizer]) for optimizer in OPTIMIZERS), strict=True
    )
    return max(loss), max(norm)


def in_words(loss: float, norm: float) -> str:
    return f"{loss:.0e} / {norm:.0e}"


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
    return f"| {name} | {in_words(loss, norm)} | {'noticed' if noticed else 'NOT NOTICED'} |\n"


def write(sections: list[str], reasons: dict[str, int], controls: list[str], floors: list[str], count: int, seconds: float) -> None:
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
How far the plain process is from itself where its gradients are accumulated over {2 * TURNS} micro batches instead of {TURNS}: what is left
of a cell beside this is rounding, which each precision has of its own.

{"".join(floors)}
fp8 is emulated: on a CPU its products are rounded as on a GPU.

{"".join(sections)}What is refused, and why:

"""
    text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
