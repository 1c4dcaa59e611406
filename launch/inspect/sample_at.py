"""`manta data sample-at`: the very text that a step was trained on, and proof that it is.

The proof is the digest that the run logged: of all token ids and targets of the step, computed here once more from the corpus.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from manta.data.errors import InputError
from manta.data.objectives.examples import DIGEST_BITS, Examples
from manta.data.objectives.render import Passage, Speller
from manta.data.sampling.sampler import Sampler
from manta.data.sampling.samples import Samples
from manta.data.shards.statistics import stream_of
from manta.launch.inspect.charts import console, visible
from manta.launch.inspect.resolve import Opened, opened
from manta.trainer.config.supported import divisors
from manta.trainer.config.training import TrainConfig
from manta.trainer.dist.layout import Layout, layout_for, max_data_ranks
from manta.trainer.metrics import Line, read_metrics

Told = dict[str, Any]
_LETTERS, _DOCUMENTS, _SEQUENCES = 320, 5, 4  # of a document, of a sequence and of a sample, where not all is shown
_STYLES = {"special": "magenta", "hidden": "bold yellow", "replaced": "bold red", "kept": "bold green"}
_PAIRS = {
    "next_sentence": {0: "B follows A", 1: "B is from elsewhere"},
    "sentence_order": {0: "A and B as they stood", 1: "A and B swapped"},
}


def sample_at(run: Path, step: int, *, slot: int | None, rank: int | None, ranks: int | None) -> Told:
    """All of it, as JSON has it. step: counted from 1, as metrics.jsonl does. ranks: data ranks to deal the step out over."""
    if not run.is_dir():
        raise InputError(f"{run}: got no directory, wants a run directory; start a run with: manta train FILE")
    whose = opened(run, [])
    config, timeline = whose.config, whose.config.timeline()
    if not 1 <= step <= config.train.steps:
        raise InputError(f"STEP: got {step}, wants 1 to {config.train.steps}, the run's train.steps; metrics.jsonl counts so")
    lines = _lines(whose)
    phase, first = timeline.stage(step - 1), timeline.first_sample(step - 1)
    layout = _layout(run, whose, lines, ranks)
    turns = layout.accumulation(phase.global_batch)
    slots = range(phase.global_batch)
    if slot is not None and slot not in slots:
        raise InputError(f"--slot: got {slot}, wants 0 to {phase.global_batch - 1}: step {step} has {phase.global_batch} samples")
    if rank is not None and rank not in range(layout.data):
        raise InputError(f"--rank: got {rank}, wants 0 to {layout.data - 1}: the step is dealt out over {layout.data} data ranks")
    wanted = [at for at in slots if slot in {None, at} and rank in {None, at // layout.micro_batch % layout.data}]
    samples, apart = whose.samples(), _kept_apart(whose)
    speller = Speller(whose.prepared().tokenizer, end_of_text=config.tokenizer.end_of_text, masked=config.data.objective == "masked")
    digest = 0
    shown: list[Told] = []
    for begin in range(0, phase.global_batch, layout.micro_batch):
        count = np.arange(first + begin, first + begin + layout.micro_batch)
        examples = samples.train(count, sequence_length=phase.sequence_length)
        digest += examples.digest()
        here = [at for at in wanted if begin <= at < begin + layout.micro_batch]
        if here:
            other = apart.train(count, sequence_length=phase.sequence_length)
            each = len(examples.tokens) // layout.micro_batch
            for at in here:
                rows = slice((at - begin) * each, (at - begin + 1) * each)
                place = _place(samples.sampler, first + at, [source.resolved_name for source in config.data.sources])
                turn, of = divmod(at // layout.micro_batch, layout.data)
                sequences = _sequences(_rows(examples, rows), _rows(other, rows), speller, config.data.pairs)
                shown.append({"rank": of, "turn": turn, "slot": at, **place, "sequences": sequences})
    logged = next((line for line in lines if line["step"] == step), None)
    return {
        "run": str(run),
        "step": step,
        "tokens_before": timeline.tokens(step - 1),
        "global_batch": phase.global_batch,
        "sequence_length": phase.sequence_length,
        "layout": str(layout),
        "data_ranks": layout.data,
        "micro_batch": layout.micro_batch,
        "turns": turns,
        "ranks_from": "--ranks" if ranks else f"attempt {lines[-1]['attempt']}" if lines else "nothing logged yet",
        "ranks_per_data_rank": layout.ranks // layout.data,
        "digest": _digest(digest % 2**DIGEST_BITS, logged, config.track.every_steps),
        "samples": shown,
    }


def _lines(whose: Opened) -> list[Line]:
    assert whose.home is not None, "a run was asked for"
    return read_metrics(whose.home.metrics_file)


def _layout(run: Path, whose: Opened, lines: list[Line], ranks: int | None) -> Layout:
    """The one that the newest attempt has; or over so many data ranks. What each step reads does not depend on it, only who does."""
    train, parallel = whose.config.train, whose.config.parallel
    if ranks is not None:
        _check_ranks(train, ranks)
        return Layout(data=ranks, micro_batch=train.micro_batch)
    if not lines:
        return Layout(data=1, micro_batch=train.micro_batch)
    world, layout = lines[-1]["world_size"], None
    with suppress(InputError):
        layout = layout_for(train, parallel, world, may_shrink=True)
    if layout is None or str(layout) != lines[-1]["layout"]:
        got = f"config.yaml that was changed since its newest step was done on {world} ranks ({lines[-1]['layout']})"
        raise InputError(f"{run}: got a {got}, wants the data ranks to deal a step out over; give --ranks")
    return layout


def _check_ranks(train: TrainConfig, ranks: int) -> None:
    turns = max_data_ranks(train)
    if turns % ranks:
        raise InputError(f"--ranks: got {ranks}, wants a divisor of train.global_batch / train.micro_batch {turns}; use {divisors(turns)}")


def _kept_apart(whose: Opened) -> Samples:
    """The same samples with documents kept apart: it is they that say where documents end."""
    config = whose.config
    data = config.data.model_copy(update={"separate_documents": True})
    return Samples(whose.prepared(), data, config.tokenizer, seed=config.run.seed)


def _place(draws: Sampler, count: int, names: list[str]) -> Told:
    """Where in the corpus the sample stands that a run reads as its `count`th."""
    number = draws.sample_numbers(np.array([count]))
    at, own = draws.locate(number)
    draw = draws.sources[int(at[0])]
    epoch, window = (int(found[0]) for found in draw.order(own))
    source = names[int(at[0])] if len(draws.sources) > 1 else names[stream_of(draw, window)]
    return {"sample": int(number[0]), "source": source, "epoch": epoch + 1, "window": window, "windows": len(draw.dataset)}


def _rows(examples: Examples, rows: slice) -> Examples:
    """Some of them."""
    fields = ("tokens", "targets", "positions", "samples", "part", "documents", "segments", "next_sentence")
    return Examples(**{name: array[rows] for name in fields if (array := getattr(examples, name)) is not None})


def _sequences(examples: Examples, apart: Examples, speller: Speller, pairs: str) -> list[Told]:
    found: list[Told] = []
    for at, row in enumerate(speller.rows(examples, apart)):
        spelled = speller(row)
        pair = None if examples.next_sentence is None else _PAIRS[pairs][int(examples.next_sentence[at])]
        documents = [_document(passage) for passage in spelled.passages]
        found.append({"ids": examples.tokens[at].tolist(), "pair": pair, "documents": documents, "padding": spelled.padding})
    return found


def _document(passage: Passage) -> Told:
    pieces = [
        {"kind": piece.kind, "text": piece.text} | ({} if piece.wanted is None else {"wanted": piece.wanted}) for piece in passage.pieces
    ]
    return {"tokens": passage.tokens, "text": passage.text, "pieces": pieces}


def _digest(computed: int, logged: Line | None, every: int) -> Told:
    if logged is None:
        why = f"track.every_steps is {every}" if every > 1 else "the run has not come to it, or went back before it"
        return {"computed": computed, "logged": None, "matches": None, "why": why}
    return {"computed": computed, "logged": logged["data/digest"], "matches": computed == logged["data/digest"]}


def show(told: Told, *, full: bool) -> None:
    out = console()
    length, batch = told["sequence_length"], told["global_batch"]
    out.print(f"step {told['step']:,} of {told['run']}: {batch:,} samples, in sequences of {length:,} tokens", soft_wrap=True)
    out.print(_proof(told["digest"]), soft_wrap=True)
    ranks = "1 data rank" if told["data_ranks"] == 1 else f"{told['data_ranks']} data ranks"
    each = f" of {told['ranks_per_data_rank']} ranks" if told["ranks_per_data_rank"] > 1 else ""
    turns = "1 turn" if told["turns"] == 1 else f"{told['turns']} turns"
    out.print(f"dealt out over {ranks}{each} x micro batch {told['micro_batch']} x {turns} ({told['ranks_from']})", soft_wrap=True)
    for sample in told["samples"]:
        out.print()
        out.rule(_head(sample), align="left", characters="─", style="dim")
        sequences = sample["sequences"]
        for number, sequence in enumerate(sequences if full else sequences[:_SEQUENCES], 1):
            if len(sequences) > 1:
                out.print(f"sequence {number} of {len(sequences)}", style="dim")
            _show_sequence(out, sequence, full=full)
        if not full and len(sequences) > _SEQUENCES:
            out.print(f"  ⋮  {len(sequences) - _SEQUENCES:,} sequences more; --full shows all", style="dim")


def _proof(digest: Told) -> Text:
    if digest["matches"] is None:
        return Text(f"digest {digest['computed']}: nothing to hold it against, the step is not in metrics.jsonl ({digest['why']})")
    if digest["matches"]:
        return Text(f"digest {digest['computed']}, as the run logged it: this is what was trained on", style="green")
    told = f"DIGEST {digest['computed']}, AND THE RUN LOGGED {digest['logged']}: THIS IS NOT WHAT WAS TRAINED ON"
    return Text(f"{told}; is the corpus the one it was begun with? manta data verify tells", style="bold red")


def _head(sample: Told) -> str:
    who = f"rank {sample['rank']} · turn {sample['turn']} · slot {sample['slot']}"
    window = f"window {sample['window']:,} of {sample['windows']:,}"
    return f"{who} · sample {sample['sample']:,} · {sample['source']} · epoch {sample['epoch']} · {window}"


def _show_sequence(out: Console, sequence: Told, *, full: bool) -> None:
    if sequence["pair"]:
        out.print(sequence["pair"], style="dim")
    documents = sequence["documents"]
    for number, document in enumerate(documents, 1):
        if not full and number == _DOCUMENTS < len(documents):
            more = documents[number - 1 : -1]
            out.print(f"  ⋮  {len(more):,} documents more, {sum(one['tokens'] for one in more):,} tokens; --full shows all", style="dim")
        if full or number < _DOCUMENTS or number == len(documents):
            text = Text.assemble(*_shortened(document["pieces"], full=full))
            for line, part in enumerate(text.split("\n", allow_blank=not text.plain.endswith("\n"))):
                out.print(Text.assemble((f"{number:>3} ┃ " if line == 0 else "    ┃ ", "cyan"), part), soft_wrap=True)
    if sequence["padding"]:
        count = sequence["padding"]
        out.print(f"    ┃ {count:,} token{'s' if count > 1 else ''} of padding", style="dim")


def _shortened(pieces: list[Told], *, full: bool) -> Iterator[tuple[str, str]]:
    """(text, style) of the pieces; of a long document its beginning and its end."""
    drawn = [_drawn(piece) for piece in pieces]
    letters = sum(len(text) for text, _ in drawn)
    if full or letters <= 2 * _LETTERS:
        yield from drawn
        return
    head, tail = 3 * _LETTERS // 4, letters - _LETTERS // 4
    begin = 0
    for text, style in drawn:
        end = begin + len(text)
        if begin < head:
            yield text[: head - begin], style
        if begin <= head < end:
            yield f" ⋯ {tail - head:,} characters ⋯ ", "dim"
        if end > tail:
            yield text[max(0, tail - begin) :], style
        begin = end


def _drawn(piece: Told) -> tuple[str, str]:
    """What is more than text stands in brackets, so that no text can be taken for it."""
    kind, text, wanted = piece["kind"], visible(piece["text"]), visible(piece.get("wanted") or "")
    if kind == "text":
        return text, ""
    return f"⟦{text}→{wanted}⟧" if kind in {"hidden", "replaced"} else f"⟦{text}⟧", _STYLES[kind]
