"""`manta data sample-at`: the text that a step was trained on.

It is verified by the digest that the run logged: a hash of all token ids and targets of the step, computed again from the corpus.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from manta.data.errors import InputError
from manta.data.objectives.examples import DIGEST_BITS, Examples
from manta.data.objectives.render import RenderedSequence, Renderer
from manta.data.sampling.samples import Sampler
from manta.data.sampling.statistics import stream_of
from manta.launch.config import find_run
from manta.launch.inspect.charts import console, rule, visible
from manta.launch.inspect.resolve import DataTarget, resolve
from manta.launch.terminal import count_text
from manta.trainer.config.divisors import divisors_text
from manta.trainer.dist.layout import Layout, layout_for, max_data_ranks
from manta.trainer.metrics import Line, read_metrics

Report = dict[str, Any]
_CHARACTERS, _DOCUMENTS, _SEQUENCES = 320, 5, 4  # shown of a document, of a sequence and of a sample, without --full
_STYLES = {"special": "magenta", "hidden": "bold yellow", "replaced": "bold red", "kept": "bold green"}
_PAIRS = {"next_sentence": ("B follows A", "B is from elsewhere"), "sentence_order": ("A and B in order", "A and B swapped")}


def sample_at(run: Path, step: int, *, slot: int | None, rank: int | None, ranks: int | None) -> Report:
    """Return the samples of a step, counted from 1 as in metrics.jsonl. ranks: data ranks to distribute the step over."""
    find_run(run)
    target = resolve(run, [])
    assert target.run is not None
    config, timeline, lines = target.config, target.config.timeline(), read_metrics(target.run.metrics_file)
    if not 1 <= step <= config.train.steps:
        raise InputError(f"STEP: expected 1 to {config.train.steps}, the run's train.steps, got {step}. Use a step of metrics.jsonl.")
    stage, first = timeline.stage(step - 1), timeline.first_sample(step - 1)
    layout = _layout(target, lines, ranks)
    if slot is not None and slot >= stage.global_batch:
        raise InputError(f"--slot: expected 0 to {stage.global_batch - 1}, the samples of step {step}, got {slot}. Lower it.")
    if rank is not None and rank >= layout.data:
        raise InputError(f"--rank: expected 0 to {layout.data - 1}, the step's data ranks, got {rank}. Lower it.")
    samples, separated = target.samples(), target.samples(separate_documents=True)  # separated documents show where they end
    is_masked = config.data.objective == "masked"
    renderer = Renderer(target.prepared().tokenizer, end_of_text=config.tokenizer.end_of_text, masked=is_masked)
    names = [source.resolved_name for source in config.data.sources]
    digest, shown = 0, list[Report]()
    for at in range(stage.global_batch):
        micro_step, data_rank = divmod(at // layout.micro_batch, layout.data)
        index = np.array([first + at])
        examples = samples.train(index, sequence_length=stage.sequence_length)
        digest += examples.digest()
        if slot in {None, at} and rank in {None, data_rank}:
            rendered = renderer(examples, separated.train(index, sequence_length=stage.sequence_length))
            location, sequences = _locate(samples.sampler, index, names), _sequences(examples, rendered, config.data.pairs)
            location["documents"] = [asdict(document) for document in samples.documents(location["sample"])]
            shown.append({"rank": data_rank, "micro_step": micro_step, "slot": at, **location, "sequences": sequences})
    logged = next((line for line in lines if line["step"] == step), None)
    return {
        "run": str(run),
        "step": step,
        "tokens_before": timeline.tokens(step - 1),
        "global_batch": stage.global_batch,
        "sequence_length": stage.sequence_length,
        "layout": str(layout),
        "data_ranks": layout.data,
        "micro_batch": layout.micro_batch,
        "accumulation": layout.accumulation(stage.global_batch),
        "ranks_from": "--ranks" if ranks else f"attempt {lines[-1]['attempt']}" if lines else "nothing logged yet",
        "ranks_per_data_rank": layout.ranks // layout.data,
        "digest": _compare_digest(digest % 2**DIGEST_BITS, logged, config.track.every_steps),
        "samples": shown,
    }


def _layout(target: DataTarget, lines: list[Line], ranks: int | None) -> Layout:
    """Return the newest attempt's layout, or one for `ranks` data ranks. It decides which rank reads a sample, never what a step reads."""
    train, parallel = target.config.train, target.config.parallel
    if ranks is not None:
        limit = max_data_ranks(train)
        if limit % ranks:
            expected = f"a divisor of train.global_batch / train.micro_batch ({limit})"
            raise InputError(f"--ranks: expected {expected}, got {ranks}. Use {divisors_text(limit)}.")
    if ranks is not None or not lines:
        return Layout(data=ranks or 1, micro_batch=train.micro_batch)
    world, logged = lines[-1]["world_size"], lines[-1]["layout"]
    with suppress(InputError):
        layout = layout_for(train, parallel, world, may_shrink=True)
        if str(layout) == logged:
            return layout
    wanted = f"the config of the newest step, which ran on {world} ranks ({logged})"
    raise InputError(f"{target.config.run.dir}: config.yaml: expected {wanted}, got a changed one. Use --ranks.")


def _locate(sampler: Sampler, read_index: NDArray[np.integer], names: list[str]) -> Report:
    """Return where in the corpus the sample is that the run reads at this index [1]."""
    numbers = sampler.sample_numbers(read_index)
    (index,), own = sampler.locate(numbers)
    source = sampler.sources[index]
    epoch, window = (int(found[0]) for found in source.order(own))
    name = names[index] if len(sampler.sources) > 1 else names[stream_of(source, window)]
    return {"sample": int(numbers[0]), "source": name, "epoch": epoch + 1, "window": window, "windows": len(source.dataset)}


def _sequences(examples: Examples, rendered: Iterable[RenderedSequence], pairs: str) -> list[Report]:
    marks = [None] * len(examples.tokens) if examples.next_sentence is None else [_PAIRS[pairs][mark] for mark in examples.next_sentence]
    rows = zip(examples.tokens.tolist(), marks, rendered, strict=True)
    return [{"ids": ids, "pair": pair, **asdict(sequence)} for ids, pair, sequence in rows]


def _compare_digest(computed: int, logged: Line | None, every: int) -> Report:
    if logged is None:
        why = f"track.every_steps is {every}" if every > 1 else "the run has not reached it, or resumed before it"
        return {"computed": computed, "logged": None, "matches": None, "why": why}
    return {"computed": computed, "logged": logged["data/digest"], "matches": computed == logged["data/digest"]}


def show(report: Report, *, full: bool) -> None:
    out = console()
    length, batch = report["sequence_length"], report["global_batch"]
    out.print(f"step {report['step']:,} of {report['run']}: {count_text(batch, 'sample')}, in sequences of {length:,} tokens")
    out.print(_digest_text(report["digest"]))
    each = f" of {report['ranks_per_data_rank']} ranks" if report["ranks_per_data_rank"] > 1 else ""
    ranks, steps = count_text(report["data_ranks"], "data rank"), count_text(report["accumulation"], "accumulation step")
    out.print(f"distributed over {ranks}{each} x micro batch {report['micro_batch']} x {steps} ({report['ranks_from']})")
    for sample in report["samples"]:
        reader = f"data rank {sample['rank']} · micro step {sample['micro_step']} · slot {sample['slot']}"
        window = f"window {sample['window']:,} of {sample['windows']:,}"
        heading = f"{reader} · sample {sample['sample']:,} · {sample['source']} · epoch {sample['epoch']} · {window}"
        out.print()
        rule(out, heading)
        _show_origins(out, sample["documents"], full=full)
        sequences = sample["sequences"]
        for number, sequence in enumerate(sequences if full else sequences[:_SEQUENCES], 1):
            if len(sequences) > 1:
                out.print(f"sequence {number} of {len(sequences)}", style="dim")
            _show_sequence(out, sequence, full=full)
        if not full and len(sequences) > _SEQUENCES:
            out.print(f"  ⋮  {len(sequences) - _SEQUENCES:,} more sequences; --full shows all", style="dim")


def _show_origins(out: Console, documents: list[Report], *, full: bool) -> None:
    for number, document in enumerate(documents if full else documents[:_DOCUMENTS], 1):
        location = "origin unknown" if document["location"] is None else visible(document["location"])
        out.print(Text(f"{number:>3} · {location} · {count_text(document['tokens'], 'token')}", style="dim"))
    if not full and len(documents) > _DOCUMENTS:
        out.print(f"  ⋮  {len(documents) - _DOCUMENTS:,} more documents; --full shows all", style="dim")


def _digest_text(digest: Report) -> Text:
    computed = f"digest {digest['computed']}"
    if digest["matches"] is None:
        return Text(f"{computed}: cannot be verified, the step is not in metrics.jsonl ({digest['why']})")
    if digest["matches"]:
        return Text(f"{computed} equals the run's log: this is what was trained on", style="green")
    message = f"{computed.upper()}, BUT THE RUN LOGGED {digest['logged']}: THIS IS NOT WHAT WAS TRAINED ON"
    return Text(f"{message}; use manta data verify to check the corpus", style="bold red")


def _show_sequence(out: Console, sequence: Report, *, full: bool) -> None:
    if sequence["pair"]:
        out.print(sequence["pair"], style="dim")
    documents = sequence["documents"]
    for number, document in enumerate(documents, 1):
        if not full and number == _DOCUMENTS < len(documents):
            skipped = documents[number - 1 : -1]
            tokens = sum(one["tokens"] for one in skipped)
            out.print(f"  ⋮  {len(skipped):,} more documents, {tokens:,} tokens; --full shows all", style="dim")
        if full or number < _DOCUMENTS or number == len(documents):
            text = Text.assemble(*map(_styled, document["pieces"]))
            if not full and len(text) > 2 * _CHARACTERS:
                head, tail = 3 * _CHARACTERS // 4, len(text) - _CHARACTERS // 4
                text = Text.assemble(text[:head], (f" ⋯ {tail - head:,} characters ⋯ ", "dim"), text[tail:])
            for line, part in enumerate(text.split("\n", allow_blank=not text.plain.endswith("\n"))):
                out.print(Text.assemble((f"{number:>3} ┃ " if line == 0 else "    ┃ ", "cyan"), part))
    if sequence["padding"]:
        out.print(f"    ┃ {count_text(sequence['padding'], 'token')} of padding", style="dim")


def _styled(piece: Report) -> tuple[str, str]:
    """Put everything but plain text in brackets, so that the two cannot be confused."""
    kind, text, target = piece["kind"], visible(piece["text"]), visible(piece.get("wanted") or "")
    if kind == "text":
        return text, ""
    return f"⟦{text}→{target}⟧" if kind in {"hidden", "replaced"} else f"⟦{text}⟧", _STYLES[kind]
