"""The package's own page templates."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from privfm.files import writable, write_atomically

REPORT = "report.html"


def rendered(name: str, **values: Any) -> str:
    """A template of this package as HTML; everything that is given is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    from privfm.reporting.drawing import theme_css

    folder = files("privfm.reporting")
    environment = Environment(
        loader=FunctionLoader(lambda part: folder.joinpath(part).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The titles inside a drawing were escaped when it was drawn.
    return environment.get_template(name).render(theme=Markup(theme_css()), drawing=Markup, **values)


def write_page(folder: Path, name: str, **values: Any) -> Path:
    """Writes a page into a folder, which is made where it is missing, in one step.

    Args:
      folder: of the experiment.
      name: of the template.
      values: it is given.

    Returns:
      Path of the page, `report.html`.

    Raises:
      InvalidArgument: the folder cannot be written.
    """
    page = rendered(name, **values)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / REPORT
    with writable(path):
        write_atomically(path, page)
    return path
