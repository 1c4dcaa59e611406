"""Fill in the Jinja templates beside this module: a job script, and a manifest."""

import shlex
from pathlib import Path
from typing import Any

import jinja2


def fill(template: str, **values: Any) -> str:
    """Return a template's text. `quote` quotes a value for a shell, `tojson` for YAML. A name without a value is an error."""
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    jinja = jinja2.Environment(loader=loader, undefined=undefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # noqa: S701  no HTML
    jinja.filters["quote"] = shlex.quote
    return jinja.get_template(template).render(values)
