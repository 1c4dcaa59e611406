"""`make parity`: each model under each layout of at most four ranks in each precision. Writes docs/parity.md; exits 1 where a cell fails.

A name or more on the command line runs those models alone and writes nothing.
"""

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

from parity import BOUNDS, MODELS, OPTIMIZERS, SILENT, TURNS, Cell, Difference, Trace, model, plain, plain_all, under, under_all
from spmd import spmd

from manta.trainer.config.sections import ParallelConfig, Precision
from manta.trainer.engine.deepspeed import Engine

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
MORE = [(stage, True, "none") for stage in (1, 2, 3)]
MORE += [(1, False, "selective"), (3, False, "selective"), (0, False, "full"), (2, False, "full"), (3, False, "full")]
LOT = 8
DOCUMENT = Path(__file__).parents[2] / "docs/parity.md"


def cells(name: str) -> list[Cell]:
    return [
        Cell(name, ranks, precision, ParallelConfig(**shares, zero=stage, offload=offload), recompute)
        for ranks, shares in SHARES
        for stage, offload, recompute in STAGES + (MORE if ranks == 2 else [])
        for precision in PRECISIONS
    ]


Result = str | dict[str, Trace]  # or why there is none


def measure(name: str) -> Iterator[tuple[Cell, Result]]:
    """Each allowed cell. Two lots at a time: ranks wait for each other half of the time."""
    allowed = [cell for cell in cells(name) if cell.refusal is None]
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
    extra = [*(["offload"] if parallel.offload else []), *([] if cell.checkpointing == "none" else [f"recompute {cell.checkpointing}"])]
    return ", ".join([*([f"data {data}"] if data > 1 or not shares else []), *shares, f"ZeRO-{parallel.zero}", *extra])


def main() -> int:
    began = time.monotonic()
    names = sys.argv[1:] or list(MODELS)
    controls = control_table()
    wrong = [line for line in controls if "NOT NOTICED" in line]
    sections, reasons, count = [], {}, 0
    floors = [f"| | {' | '.join(PRECISIONS)} |\n|---|{'---|' * len(PRECISIONS)}\n"]
    for name in names:
        columns = [(name, precision) for precision in PRECISIONS]
        references, again = (spmd(plain_all, 1, columns, turns, timeout=600.0)[0] for turns in (TURNS, 2 * TURNS))
        floors.append(f"| {name} | {' | '.join(str(apart(again, references, *column)) for column in columns)} |\n")
        shown: dict[Cell, str] = {}
        for cell, result in measure(name):
            if isinstance(result, str):
                wrong.append(f"{cell}: {result}")
                shown[cell] = "FAILED"
            else:
                traces = {(name, cell.precision, optimizer): trace for optimizer, trace in result.items()}
                difference = apart(traces, references, name, cell.precision)
                other = apart(traces, again, name, cell.precision)
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
        sections += [f"| {row} | {' | '.join(row_cells)} |\n" for row, row_cells in rows.items() if not refused_alike(row_cells)]
        sections.append("\n")
    for line in wrong:
        print(f"WRONG {line}", flush=True)
    if not sys.argv[1:]:
        write(sections, reasons, controls, floors, count, time.monotonic() - began)
    return 1 if wrong else 0


def refused_alike(row: list[str]) -> bool:
    """A layout that no precision has, all for one reason: experts of a model that has none."""
    return len(set(row)) == 1 and row[0].startswith("[")


Traces = dict[tuple[str, Precision, str], Trace]


def apart(ours: Traces, theirs: Traces, name: str, precision: Precision) -> Difference:
    """The largest under either optimizer."""
    both = [ours[name, precision, optimizer].differs(theirs[name, precision, optimizer]) for optimizer in OPTIMIZERS]
    furthest = max(both, key=lambda difference: difference.weight)
    return Difference(max(d.loss for d in both), max(d.norm for d in both), furthest.weight, furthest.furthest)


def doubled(engine: Engine, weight: str = "embedding.weight") -> None:
    engine.module.get_parameter(weight).register_hook(lambda gradient: gradient * 2)


def unreduced(engine: Engine) -> None:
    """Each rank keeps to its own gradients."""
    engine.zero_optimizer.average_tensor = lambda *_, **__: None


def head_norms_unreduced(engine: Engine) -> None:
    """Each tensor rank keeps to what its own heads say of the norm that all heads share."""
    for name, parameter in engine.module.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter._backward_hooks.clear()


CONTROLS = [
    *(("the embedding's gradient doubled", Cell("llama", 2, precision), doubled) for precision in ("fp32", "bf16")),
    *(("a reduction left out", Cell("llama", 2, precision), unreduced) for precision in ("fp32", "bf16")),
    *(
        ("q_norm and k_norm not reduced", Cell("llama", 2, precision, ParallelConfig(tensor=2)), head_norms_unreduced)
        for precision in ("fp32", "bf16")
    ),
]
"""Known-bad runs, which the comparison must notice."""


def each_doubled(name: str, precision: Precision) -> dict[str, Difference]:
    """For one rank: what the comparison says where the gradient of one weight is doubled, each weight in its turn. SGD sees scale."""
    reference = plain(name, precision, "sgd")
    weights = [weight for weight, _ in model(name).named_parameters() if not SILENT.fullmatch(weight)]
    cell = Cell(name, 1, precision)
    return {weight: under(cell, "sgd", partial(doubled, weight=weight)).differs(reference) for weight in weights}


def control_table() -> list[str]:
    lines = []
    for (fault, cell, put_in), optimizer in product(CONTROLS, OPTIMIZERS):
        lines.append(control_line(f"{fault}, {cell.precision}, {optimizer}", controlled(cell, optimizer, put_in), cell.precision))
    lines.append(control_line("ZeRO-0 in bf16, adamw", controlled(Cell("llama", 2, "bf16", ParallelConfig(zero=0)), "adamw"), "bf16"))
    for name in MODELS:
        differences = spmd(each_doubled, 1, name, "bf16", timeout=600.0)[0].values()
        least = min(differences, key=lambda difference: difference.weight)
        noticed = sum(not difference.within(BOUNDS["bf16"]) for difference in differences)
        what = f"one weight's gradient doubled, {name}, bf16, sgd: {noticed} of {len(differences)} weights"
        lines.append(f"| {what} | {least} | {'noticed' if noticed == len(differences) else 'NOT NOTICED'} |\n")
    return lines


def controlled(cell: Cell, optimizer: str, put_in: Callable[[Engine], None] | None = None) -> Difference:
    reference = spmd(plain, 1, cell.model, cell.precision, optimizer)[0]
    return spmd(under, cell.ranks, cell, optimizer, put_in)[0].differs(reference)


def control_line(what: str, difference: Difference, precision: Precision) -> str:
    return f"| {what} | {difference} | {'NOT NOTICED' if difference.within(BOUNDS[precision]) else 'noticed'} |\n"


def write(sections: list[str], reasons: dict[str, int], controls: list[str], floors: list[str], count: int, seconds: float) -> None:
    bounds = "".join(f"| {precision} | {bound} |\n" for precision, bound in BOUNDS.items())
    text = f"""# Parity

What a model computes under a layout, against one plain PyTorch process (no DeepSpeed) of the same precision, fp32 masters included. Ten
optimizer steps under AdamW and under SGD, every gradient clipped, gradients accumulated over at least two micro batches, padding that
differs between ranks and micro batches, dropout on where the model has it. DeepSpeed is given so little room that gradients come in many
buckets, and that ZeRO-3 gathers weights in pieces, as it does with large models.

A cell shows three relative differences, each the largest that was found under either optimizer: of the loss of a step, of the gradient norm
of a step, and of how far a weight has moved after the last step, each weight by itself. Weights that several ranks hold must
be the same on all of them, bit by bit. Written by `make parity`: {count} cells in {seconds / 60:.0f} minutes on two cores.

| within | loss / norm / weight |
|---|---|
{bounds}
Left out is the bias of the keys, which softmax does not see: its gradient is zero but for rounding.

## Controls

Runs with a fault put in, which must not pass. Where ranks that hold the same weight hold other values of it, that is inf:

| fault | loss / norm / weight | |
|---|---|---|
{"".join(controls)}
How far the plain process is from itself where its gradients are accumulated over {2 * TURNS} micro batches instead of {TURNS}: what each
precision has of rounding. In 16 and 8 bits a mixture's router sends some tokens elsewhere by it, and from step to step AdamW carries two
such processes further apart. A cell with a \\* is out of bounds against the one, by that, and compared with the other.

{"".join(floors)}
fp8 is emulated: on a CPU its products are rounded as on a GPU.

{"".join(sections)}## Refused, and why

"""
    text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    sys.exit(main())
