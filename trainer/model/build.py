"""Build a model from the config's model section."""

import importlib
import inspect
import sys
import traceback
from pathlib import Path

from manta.data.errors import InputError, one_line
from manta.trainer.config.model import ModelConfig
from manta.trainer.model.bert import Bert
from manta.trainer.model.gpt2 import GPT2
from manta.trainer.model.llama import Llama
from manta.trainer.model.transformer import Transformer

FAMILIES: dict[str, type[Transformer]] = {"llama": Llama, "gpt2": GPT2, "bert": Bert}
MANUAL = "docs/own_model.md shows an example."


def build_model(config: ModelConfig, *, vocabulary: int, sequence_length: int, code: Path | None = None) -> Transformer:
    """Return a model with uninitialized weights. vocabulary: the tokenizer's size. code: see `load_class`.

    Raises InputError if the sizes do not fit, or the user's class is not usable.
    """
    rows = config.embedding_rows(vocabulary)
    family = FAMILIES.get(config.family) or load_class(config.family, code)
    model = family(config, vocabulary=rows, sequence_length=sequence_length)  # type: ignore[call-arg]  load_class checks the signature
    if missing := [name for name in ("terms", "blocks") if not hasattr(model, name)]:
        raise _unusable(config.family, f"its __init__ sets no {' and no '.join(missing)}")
    return model


def load_class(path: str, code: Path | None = None) -> type[Transformer]:
    """Return the user's class `package.module:Class`, from an installed package or else from a file in `code`.

    code: the working directory if None. Raises InputError if the class cannot be imported, or is not a model.
    """
    module_name, _, name = path.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise InputError(f"model.family: expected package.module:Class, got {path!r}. Use valid Python names.")
    directory = str(code or Path.cwd())
    sys.path.append(directory)  # last, and only for this import: a user's file does not shadow our modules
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        remedy = "Install the package, or start manta from the module's directory."
        raise _unusable(path, f"there is no module {error.name}, installed or in {directory}", remedy) from error
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        position = "" if isinstance(error, SyntaxError) else f" ({at.filename}:{at.lineno})"  # a SyntaxError names its own
        raise _unusable(path, f"its import raises {type(error).__name__}: {one_line(error)}{position}", "Fix the module.") from error
    finally:
        sys.path.remove(directory)
    return _check_class(path, getattr(module, name, None), file=getattr(module, "__file__", None) or module_name)


def _check_class(path: str, found: object, *, file: str) -> type[Transformer]:
    if not (isinstance(found, type) and issubclass(found, Transformer)):
        got = "missing" if found is None else repr(found)
        raise _unusable(path, f"it is {got} in {file}", "Derive a class from manta.trainer.model.transformer.Transformer.")
    if missing := sorted(found.__abstractmethods__):
        raise _unusable(path, f"the class in {file} does not define {', '.join(missing)}")
    try:
        inspect.signature(found).bind(None, vocabulary=1, sequence_length=1)
    except TypeError as error:
        raise _unusable(path, f"the class in {file} cannot be built with (config, vocabulary=..., sequence_length=...): {error}") from None
    return found


def _unusable(path: str, problem: str, remedy: str = MANUAL) -> InputError:
    return InputError(f"model.family: expected a model class, got {path!r}: {problem}. {remedy}")
