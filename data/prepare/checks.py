"""What is wrong with sources as config names them, told before anything is written."""

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare.progress import say
from manta.data.sources.config import FilterConfig, SourceConfig
from manta.data.sources.source import ignored_files, source_files, validation_source
from manta.data.sources.splits import content_kind
from manta.data.storage.location import resolve

_SPELLED = {"text": "text", "ids": "token ids in a field", "shards": "token shards"}


def check_sources(data: DataConfig, tokens: TokenizerConfig) -> None:
    """Raises InputError where a file is missing, or held out and trained on, where kinds do not fit, or ids want their tokenizer."""
    for source in data.sources:
        held_out = validation_source(source)
        for one in (source, held_out):
            if one is not None:
                source_files(one)
        kind = content_kind(source, data)
        if kind != "text" and tokens.file is None:
            raise InputError(f"data.sources: {source.called!r}: holds token ids; wants the tokenizer that wrote them: set tokenizer.file")
        if kind == "shards":
            _asks_nothing_of_text(source)
        if held_out is not None:
            _fits(source, held_out, kind, content_kind(held_out, data))
        if passed := ignored_files(source):
            say(f"prepare: {source.called}: {len(passed)} files are not part of it, by their kind; the first is {passed[0]}")


def _asks_nothing_of_text(source: SourceConfig) -> None:
    for key, is_set in (
        ("filter", source.filter != FilterConfig()),
        ("template", source.template is not None),
        ("text_field", source.text_field is not None),
    ):
        if is_set:
            wants = "none: token shards have no text for it"
            raise InputError(f"data.sources: {source.called!r}: got a {key}, wants {wants}; leave it out")


def _places(source: SourceConfig) -> set[str]:
    return {resolve(file.path) for file in source_files(source)}


def _fits(source: SourceConfig, held_out: SourceConfig, kind: str, other: str) -> None:
    where = f"data.sources: {source.called!r}: validation"
    if kind != other:
        raise InputError(f"{where}: got {_SPELLED[other]}, wants {_SPELLED[kind]} as in its path; make it of one kind")
    shared = _places(source) & _places(held_out)
    if shared:
        raise InputError(f"{where}: got {min(shared)}, which is trained on as well; wants other files than its path has: keep them apart")
