"""`make parity`: every model under every layout of at most four ranks in every precision. Writes docs/parity.md; exits 1 if a cell fails.

With model names on the command line, runs only those models and writes nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

from parity import (
    ACCUMULATION,
    BOUNDS,
    MODELS,
    NO_GRADIENT,
    OPTIMIZERS,
    Cell,
    Difference,
    Trace,
    model,
    run_cell,
    run_cells,
    run_plain,
    run_plain_cells,
)
from spmd import spmd

from manta.trainer.config.sections import ParallelConfig, Precision
from manta.trainer.engine.deepspeed import Engine

FEWER, MORE = ACCUMULATION, 2 * ACCUMULATION  # micro batches per step
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16-autocast", "bf16", "fp16", "fp8")
SIZES_BY_RANKS = [
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
# For each of them: ZeRO's stages; on two ranks also offloading and activation checkpointing.
STAGES = [(stage, False, "none") for stage in (0, 1, 2, 3)]
EXTRA_STAGES = [(stage, True, "none") for stage in (1, 2, 3)]
EXTRA_STAGES += [(1, False, "selective"), (3, False, "selective"), (0, False, "full"), (2, False, "full"), (3, False, "full")]
LOT = 8
DOCUMENT = Path(__file__).parents[2] / "docs/parity.md"


def cells(name: str) -> list[Cell]:
    return [
        Cell(name, ranks, precision, ParallelConfig(**sizes, zero=stage, offload=offload), checkpointing)
        for ranks, sizes in SIZES_BY_RANKS
        for stage, offload, checkpointing in STAGES + (EXTRA_STAGES if ranks == 2 else [])
        for precision in PRECISIONS
    ]


Result = str | dict[str, Trace]  # the error, or a trace for each optimizer


def measure(name: str) -> Iterator[tuple[Cell, Result]]:
    """Run every supported cell. Two lots run at a time, since ranks wait for each other half of the time."""
    supported = [cell for cell in cells(name) if cell.refusal is None]
    by_ranks = [[cell for cell in supported if cell.ranks == ranks] for ranks in (1, 2, 4)]
    lots = [group[first : first + LOT] for group in by_ranks for first in range(0, len(group), LOT)]
    with ThreadPoolExecutor(2) as pool:
        for lot, results in zip(lots, pool.map(measure_lot, lots), strict=True):
            yield from zip(lot, results, strict=True)


def measure_lot(lot: list[Cell]) -> list[Result]:
    """Run cells in the same processes: forks and rendezvous cost as much as a cell. If one of them fails, run each alone."""
    try:
        return spmd(run_cells, lot[0].ranks, lot, timeout=600.0)[0]
    except AssertionError as error:
        if len(lot) == 1:
            return [str(error).strip().splitlines()[-1]]
        return [result for cell in lot for result in measure_lot([cell])]


def layout_name(cell: Cell) -> str:
    parallel = cell.parallel
    sizes = [f"{name} {size}" for name in ("tensor", "sequence", "expert") if (size := getattr(parallel, name)) > 1]
    data = cell.ranks // (parallel.tensor * parallel.sequence)
    extra = [*(["offload"] if parallel.offload else []), *([] if cell.checkpointing == "none" else [f"checkpointing {cell.checkpointing}"])]
    return ", ".join([*([f"data {data}"] if data > 1 or not sizes else []), *sizes, f"ZeRO-{parallel.zero}", *extra])


def main() -> int:
    start = time.monotonic()
    names = sys.argv[1:] or list(MODELS)
    controls = control_table()
    wrong = [line for line in controls if "NOT DETECTED" in line]
    sections, reasons, count = [], {}, 0
    floors = [f"| | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}\n"]
    for name in names:
        columns = [(name, precision) for precision in PRECISIONS]
        references, again = (spmd(run_plain_cells, 1, columns, number, timeout=600.0)[0] for number in (FEWER, MORE))
        floors.append(f"| {name} | {' | '.join(str(largest_difference(again, references, *column)) for column in columns)} |\n")
        shown: dict[Cell, str] = {}
        for cell, result in measure(name):
            if isinstance(result, str):
                wrong.append(f"{cell}: {result}")
                shown[cell] = "FAILED"
            else:
                traces = {(name, cell.precision, optimizer): trace for optimizer, trace in result.items()}
                difference = largest_difference(traces, references, name, cell.precision)
                other = largest_difference(traces, again, name, cell.precision)
                shown[cell] = str(difference)
                if not difference.within(BOUNDS[cell.precision]):
                    if other.within(BOUNDS[cell.precision]):
                        shown[cell] = f"{other} \\*"
                    else:
                        wrong.append(f"{cell}: {difference!r}, {other!r}")
                        shown[cell] += " WRONG"
            print(f"{cell}: {shown[cell]}", flush=True)
        count += len(shown)
        rows: dict[str, list[str]] = {}
        for cell in cells(name):
            row = rows.setdefault(layout_name(cell), [])
            row.append(f"[{reasons.setdefault(cell.refusal, len(reasons) + 1)}]" if cell.refusal else shown[cell])
        sections.append(f"## {name}\n\n| layout | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}\n")
        sections += [f"| {row} | {' | '.join(row_cells)} |\n" for row, row_cells in rows.items() if not refused_everywhere(row_cells)]
        sections.append("\n")
    for line in wrong:
        print(f"WRONG {line}", flush=True)
    if not sys.argv[1:]:
        write(sections, reasons, controls, floors, count, time.monotonic() - start)
    return 1 if wrong else 0


def refused_everywhere(row: list[str]) -> bool:
    """Whether every precision is refused for the same reason, such as expert parallelism without experts."""
    return len(set(row)) == 1 and row[0].startswith("[")


Traces = dict[tuple[str, Precision, str], Trace]


def largest_difference(traces: Traces, references: Traces, name: str, precision: Precision) -> Difference:
    """Return the largest differences under either optimizer."""
    both = [traces[name, precision, optimizer].difference(references[name, precision, optimizer]) for optimizer in OPTIMIZERS]
    worst = max(both, key=lambda difference: difference.weight)
    return Difference(max(d.loss for d in both), max(d.norm for d in both), worst.weight, worst.worst_weight)


def double_gradient(engine: Engine, weight: str = "embedding.weight") -> None:
    engine.module.get_parameter(weight).register_hook(lambda gradient: gradient * 2)


def skip_reduction(engine: Engine) -> None:
    """Make each rank use only its own gradients."""
    engine.zero_optimizer.average_tensor = lambda *_, **__: None


def skip_head_norm_reduction(engine: Engine) -> None:
    """Make each tensor rank use only its own heads' gradient of the norm that all heads share."""
    for name, parameter in engine.module.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter._backward_hooks.clear()


CONTROLS = [
    *(("the embedding's gradient doubled", Cell("llama", 2, precision), double_gradient) for precision in ("fp32", "bf16")),
    *(("gradients not reduced", Cell("llama", 2, precision), skip_reduction) for precision in ("fp32", "bf16")),
    *(
        ("q_norm and k_norm gradients not reduced", Cell("llama", 2, precision, ParallelConfig(tensor=2)), skip_head_norm_reduction)
        for precision in ("fp32", "bf16")
    ),
]
"""Faults that the comparison must detect."""


def double_each_gradient(name: str, precision: Precision) -> dict[str, Difference]:
    """For each weight, return the difference if its gradient is doubled, on one rank. SGD reveals errors of scale."""
    reference = run_plain(name, precision, "sgd")
    weights = [weight for weight, _ in model(name).named_parameters() if not NO_GRADIENT.fullmatch(weight)]
    cell = Cell(name, 1, precision)
    return {weight: run_cell(cell, "sgd", partial(double_gradient, weight=weight)).difference(reference) for weight in weights}


def control_table() -> list[str]:
    lines = []
    for (fault, cell, inject), optimizer in product(CONTROLS, OPTIMIZERS):
        lines.append(control_line(f"{fault}, {cell.precision}, {optimizer}", run_control(cell, optimizer, inject), cell.precision))
    lines.append(control_line("ZeRO-0 in bf16, adamw", run_control(Cell("llama", 2, "bf16", ParallelConfig(zero=0)), "adamw"), "bf16"))
    for name in MODELS:
        differences = spmd(double_each_gradient, 1, name, "bf16", timeout=600.0)[0].values()
        least = min(differences, key=lambda difference: difference.weight)
        detected = sum(not difference.within(BOUNDS["bf16"]) for difference in differences)
        what = f"one weight's gradient doubled, {name}, bf16, sgd: {detected} of {len(differences)} weights"
        lines.append(f"| {what} | {least} | {'detected' if detected == len(differences) else 'NOT DETECTED'} |\n")
    return lines


def run_control(cell: Cell, optimizer: str, inject: Callable[[Engine], None] | None = None) -> Difference:
    reference = spmd(run_plain, 1, cell.model, cell.precision, optimizer)[0]
    return spmd(run_cell, cell.ranks, cell, optimizer, inject)[0].difference(reference)


def control_line(what: str, difference: Difference, precision: Precision) -> str:
    return f"| {what} | {difference} | {'NOT DETECTED' if difference.within(BOUNDS[precision]) else 'detected'} |\n"


def write(sections: list[str], reasons: dict[str, int], controls: list[str], floors: list[str], count: int, seconds: float) -> None:
    bounds = "".join(f"| {precision} | {bound} |\n" for precision, bound in BOUNDS.items())
    text = f"""# Parity

Every model under every layout, compared with one plain PyTorch process (no DeepSpeed) of the same precision, also with fp32 masters. Each
cell trains ten optimizer steps under AdamW and under SGD, with clipped gradients, gradient accumulation over at least two micro batches,
padding that differs between ranks and micro batches, and dropout if the model has it. DeepSpeed gets small buffers, so that gradients
fill many buckets and ZeRO-3 gathers weights in pieces, as with large models.

A cell shows three relative differences, each the largest under either optimizer: of a step's loss, of a step's gradient norm, and of a
single weight's movement after the last step. Replicas of a weight must be bitwise the same. Written by `make parity`: {count} cells in
{seconds / 60:.0f} minutes on two cores.

| bound | loss / norm / weight |
|---|---|
{bounds}
The comparison excludes the bias of the keys: softmax is invariant to it, so its gradient is only rounding error.

## Controls

These runs have an injected fault, which the comparison must detect. A difference of inf means that replicas of a weight are not the same.

| fault | loss / norm / weight | |
|---|---|---|
{"".join(controls)}
The next table compares the plain process with itself, accumulating gradients over {MORE} micro batches instead of {FEWER}: it shows
each precision's rounding error. In 16 and 8 bits that error changes which experts some tokens use, and AdamW amplifies the difference from
step to step. A cell with \\* exceeds the bounds for this reason; it is compared with the process that accumulates over {MORE}.

{"".join(floors)}
fp8 is emulated: a CPU rounds its products like a GPU.

{"".join(sections)}## Unsupported, and why

"""
    text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
