"""A page on what was reconstructed: tables, and the recovered beside the original."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from io import BytesIO
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from privfm.checks import require
from privfm.reporting.drawing import Panel
from privfm.reporting.table import ReportTable
from privfm.reporting.templates import write_page

Word = tuple[str, bool]
"""A word of a prediction, and whether it stands in the original, in this order."""


@final
@dataclass(frozen=True)
class Exhibit:
    """One observation and what an attack made of it.

    Attributes:
      title: attack, defence, size.
      note: its score, and what the attack was told.
      texts: an original and the words of its prediction (none: nothing was recovered), a line each.
      images: an original, its prediction (empty: none) and a caption, as data addresses.
    """

    title: str
    note: str
    texts: tuple[tuple[str, tuple[Word, ...]], ...] = ()
    images: tuple[tuple[str, str, str], ...] = ()


def marked(original: str, recovered: str) -> tuple[Word, ...]:
    """The words of a prediction; those of the longest matching runs are right.

    >>> marked("the plot never finds its feet", "the plot finds feet")
    (('the', True), ('plot', True), ('finds', True), ('feet', True))
    """
    own, said = original.split(), recovered.split()
    right = [False] * len(said)
    for run in SequenceMatcher(None, own, said, autojunk=False).get_matching_blocks():
        right[run.b : run.b + run.size] = [True] * run.size
    return tuple(zip(said, right, strict=True))


def picture(image: Tensor) -> str:
    """An image `(1 or 3, h, w)` with values in [0, 1] (others are cut) as the address of a PNG inside the page."""
    from PIL import Image

    require(image.dim() == 3 and len(image) in (1, 3), f"image has shape {tuple(image.shape)}: expected (1 or 3, h, w)")
    values = (image.detach().cpu().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    array = values[0] if len(values) == 1 else values.permute(1, 2, 0)
    buffer = BytesIO()
    Image.fromarray(array.numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


def write_reconstructions(
    folder: Path,
    question: str,
    answers: Sequence[tuple[str, str]],
    tables: Sequence[ReportTable],
    exhibits: Sequence[Exhibit],
    *,
    panels: Sequence[Panel] = (),
    conditions: Mapping[str, str] | None = None,
) -> Path:
    """Writes `report.html` into a folder, in one step; the page needs nothing from elsewhere.

    Args:
      folder: made where it is missing.
      question: the title.
      answers: short ones, each under what it answers.
      tables: in order.
      exhibits: in order.
      panels: drawings.
      conditions: command, date, versions.

    Raises:
      InvalidArgument: the folder cannot be written.
    """
    return write_page(
        folder,
        "reconstructions.html",
        question=question,
        answers=answers,
        tables=tables,
        exhibits=exhibits,
        panels=panels,
        conditions=conditions or {},
        never=lambda names: False,
    )
