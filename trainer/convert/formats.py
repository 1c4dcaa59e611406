"""Formats of a whole model, by name. To add one, write a function with the same arguments, and list it here and in launch/cli.py.

Checkpoints that plain DeepSpeed saved are another matter: they hold optimizer state, and become a run (deepspeed/).
"""

from manta.trainer.convert.huggingface.export import export
from manta.trainer.convert.huggingface.import_model import import_model

EXPORTERS = {"hf": export}
IMPORTERS = {"hf": import_model}
