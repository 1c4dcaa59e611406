"""From the model section of a config to a model."""

import importlib
import inspect
import sys
import traceback
from pathlib import Path

from manta.data.errors import InputError
from manta.trainer.config.model import ModelConfig
from manta.trainer.model.bert import Bert
from manta.trainer.model.gpt2 import GPT2
from manta.trainer.model.llama import Llama
from manta.trainer.model.transformer import Transformer

FAMILIES: dict[str, type[Transformer]] = {"llama": Llama, "gpt2": GPT2, "bert": Bert}


def build(config: ModelConfig, *, vocabulary: int, sequence_length: int, code: Path | None = None) -> Transformer:
    """vocabulary: the tokenizer's size. code: as in `own`.

    Raises InputError where the sizes do not fit, or a class of the user's can not be had.
    """
    rows = config.vocabulary or vocabulary
    if rows < vocabulary:
        raise InputError(f"model.vocabulary: got {rows}, wants at least the tokenizer's {vocabulary}; raise it or leave it out")
    if config.positions is not None and config.positions < sequence_length:
        wants = f"at least data.sequence_length {sequence_length}"
        raise InputError(f"model.positions: got {config.positions}, wants {wants}; shorten the sequences or raise it")
    family = FAMILIES.get(config.family) or own(config.family, code)
    made = family(config, vocabulary=rows, sequence_length=sequence_length)  # type: ignore[call-arg]  the signature that docs/models.md asks for
    if missing := [name for name in ("terms", "blocks") if not hasattr(made, name)]:
        raise InputError(
            f"model.family: got {config.family!r}, whose __init__ sets no {' and no '.join(missing)}; docs/models.md shows how"
        )
    return made


def own(path: str, code: Path | None = None) -> type[Transformer]:
    """The user's class at package.module:Class: of an installed package, else of a file in `code`, the working directory where None.

    Raises InputError where it can not be imported, or is no model.
    """
    module, _, name = path.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise InputError(f"model.family: got {path!r}, wants package.module:Class, as Python names them")
    place = str(code or Path.cwd())
    sys.path.append(place)  # last, and for this import alone: a file of the user's shadows nothing of ours
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = "install the package, or start manta from where the module lies"
        raise InputError(f"model.family: got {path!r}, and there is no module {error.name}, installed or in {place}; {remedy}") from error
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        where = traceback.extract_tb(error.__traceback__)[-1]
        seen = "" if isinstance(error, SyntaxError) else f" ({where.filename}:{where.lineno})"
        raise InputError(f"model.family: got {path!r}, and its import ends with {told}{seen}; mend it") from error
    finally:
        sys.path.remove(place)
    return _checked(path, getattr(found, name, None), where=getattr(found, "__file__", None) or module)


def _checked(path: str, found: object, *, where: str) -> type[Transformer]:
    if not (isinstance(found, type) and issubclass(found, Transformer)):
        got = "nothing" if found is None else repr(found)
        wants = "a class that derives from manta.trainer.model.transformer.Transformer"
        raise InputError(f"model.family: got {path!r}, which is {got} in {where}, wants {wants}")
    if missing := sorted(found.__abstractmethods__):
        raise InputError(f"model.family: got {path!r} in {where}, which lacks {', '.join(missing)}; define them, as docs/models.md shows")
    try:
        inspect.signature(found).bind(None, vocabulary=1, sequence_length=1)
    except TypeError as error:
        raise InputError(
            f"model.family: got {path!r} in {where}, wants __init__(config, *, vocabulary, sequence_length): {error}"
        ) from None
    return found
