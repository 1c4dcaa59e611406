"""Check sources before anything is written."""

from manta.data.config import DataConfig, TokenizerConfig
from manta.data.errors import InputError
from manta.data.prepare.progress import report
from manta.data.source_config import SourceConfig
from manta.data.sources.source import ignored_files, source_files, validation_source
from manta.data.sources.splits import content_kind
from manta.data.storage.location import StoredFile, resolve

_KIND_NAMES = {"text": "text", "ids": "token ids in a field", "shards": "token shards"}


def check_sources(data: DataConfig, tokens: TokenizerConfig) -> None:
    """Raise InputError for a missing file, a validation path that does not fit, token ids without their tokenizer, or unused keys."""
    for source in data.sources:
        key = f"data.sources: {source.resolved_name!r}"
        validation = validation_source(source)
        files = source_files(source)
        validation_files = [] if validation is None else source_files(validation)
        kind = content_kind(source, data)
        if kind != "text" and tokens.file is None:
            raise InputError(f"{key}: expected text, or the tokenizer that wrote its token ids, got token ids. Set tokenizer.file.")
        for name in ("filter", "template", "text_field") if kind == "shards" else ():
            if getattr(source, name) != SourceConfig.model_fields[name].default:
                raise InputError(f"{key}: expected no {name} for token shards, which have no text, got one. Remove it.")
        if validation is not None and (other := content_kind(validation, data)) != kind:
            raise InputError(f"{key}: validation: expected {_KIND_NAMES[kind]} as in its path, got {_KIND_NAMES[other]}. Use one kind.")
        if validation_files and (shared := _resolved(files) & _resolved(validation_files)):
            raise InputError(f"{key}: validation: expected other files than its path has, got {min(shared)} in both. Separate them.")
        if ignored := ignored_files(source):
            report(f"prepare: {source.resolved_name}: ignored {len(ignored)} files by their format, first {ignored[0]}")


def _resolved(files: list[StoredFile]) -> set[str]:
    return {resolve(file.path) for file in files}
