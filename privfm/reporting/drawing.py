"""How a panel is drawn: matplotlib without global state, as a small SVG that follows its page's light or dark theme.

A panel is as wide as a phone, so that its text stays readable there; a page puts several side by side. Colours are
names with a light and a dark value: the SVG refers to them as CSS variables, with the light value as what to fall back
to. Text stays text (it can be searched, selected and read out).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal, final

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360  # points, which a phone shows as about as many pixels
SMALL, NORMAL, LARGE = 10.0, 11.0, 12.0  # font sizes in points
LINE = 12.0  # points from one line of small text to the next

# name: (light, dark). The six hues stay apart for the common colour-blindnesses and in grey.
COLOURS = {
    "ink": ("#1c2127", "#e7eaee"),
    "muted": ("#5a6570", "#a3adb8"),
    "line": ("#d5dae0", "#39424c"),
    "blue": ("#1f66b0", "#6fb0f2"),
    "orange": ("#c2500f", "#f5935a"),
    "green": ("#16795a", "#4fc79f"),
    "violet": ("#7c4799", "#c99ae6"),
    "ochre": ("#8f6b00", "#dcb94f"),
    "pink": ("#b8386f", "#f28ab5"),
    "loss": ("#d1491b", "#e8632f"),
}
SERIES = ("blue", "orange", "green", "violet", "ochre", "pink")
DASHES = ("solid", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "privfm",  # identifiers follow from the content, not from chance
    "svg.fonttype": "none",
    "text.parse_math": False,  # a title may hold a dollar sign
    "font.family": "DejaVu Sans",  # shipped with matplotlib: the layout is the same everywhere
    "font.size": NORMAL,
    "axes.linewidth": 0.8,
    "lines.solid_capstyle": "round",
}


@final
@dataclass(frozen=True)
class Panel:
    """One drawing.

    Attributes:
      svg: an `<svg>` element for a page that defines the colours (`theme_css`).
      label: what it shows, in words.
    """

    svg: str
    label: str

    def standalone(self) -> str:
        """The drawing as a file of its own, which follows the reader's light or dark setting."""
        head, body = self.svg.split(">", 1)
        return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{theme_css("svg")}</style>{body}\n'


def colour(name: str) -> str:
    """The value in which matplotlib draws a named colour; `render` puts the variable in its place."""
    return COLOURS[name][0]


def series_name(number: int) -> str:
    """The name of a series' colour; beyond six they repeat, with another dash (`series_dash`)."""
    return SERIES[number % len(SERIES)]


def series_dash(number: int) -> str | tuple[float, tuple[float, ...]]:
    """The line style of a series: lines differ by more than their colour."""
    return DASHES[(number + number // len(SERIES)) % len(DASHES)]


def theme_css(root: str = ":root") -> str:
    """CSS that defines the colours, for light and dark."""
    light, dark = ("".join(f"--{name}:{values[mode]};" for name, values in COLOURS.items()) for mode in (0, 1))
    return f"{root}{{{light}}}@media screen and (prefers-color-scheme:dark){{{root}{{{dark}}}}}"


@contextmanager
def drawing_style() -> Iterator[None]:
    """Drawing and rendering happen inside; matplotlib's settings are put back afterwards."""
    from matplotlib import rc_context

    with rc_context(_STYLE), warnings.catch_warnings():
        # The browser's font draws the text; that the font used for measuring lacks a letter does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def canvas(height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """An empty drawing, `WIDTH` points wide, with axes inside the given margins (points)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    inner = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - top - bottom) / height)
    axes = figure.add_axes(inner)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colour("line"))
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=colour("muted"), pad=4)
    return figure, axes


def heading(figure: Figure, title: str, subtitle: str = "") -> None:
    """Title and subtitle at the top left of a drawing; they take 36 points."""
    height = figure.get_figheight() * 72
    figure.text(2 / WIDTH, 1 - 13 / height, title, color=colour("ink"), fontsize=LARGE, fontweight="bold")
    figure.text(2 / WIDTH, 1 - 28 / height, subtitle, color=colour("muted"), fontsize=SMALL)


def write_lines(
    axes: Axes,
    place: tuple[float, float],
    text: str,
    *,
    ink: str = "ink",
    align: Literal["left", "center", "right"] = "left",
    size: float = SMALL,
    shift: tuple[float, float] = (0.0, 0.0),
    across: bool = False,
) -> None:
    """Writes lines of text, centred in height, each anchored by itself: a browser's font is not the one measured here.

    Args:
      axes: where.
      place: (x, y) of the text, in data units.
      text: its lines.
      ink: name of its colour.
      align: which side of the text stands at x.
      size: font size in points.
      shift: (right, up) in points.
      across: x counts the axes' width from 0 to 1 instead.
    """
    lines = text.split("\n")
    for number, line in enumerate(lines):
        up = shift[1] + LINE * ((len(lines) - 1) / 2 - number) - 0.35 * size
        axes.annotate(
            line,
            place,
            (shift[0], up),
            xycoords=axes.get_yaxis_transform() if across else "data",
            textcoords="offset points",
            color=colour(ink),
            fontsize=size,
            ha=align,
            va="baseline",
            annotation_clip=False,
        )


def lines_height(text: str) -> float:
    """Points that small lines of text take, with a little air around."""
    return LINE * (text.count("\n") + 1) + 3


def spread_apart(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Moves centres apart until boxes of the given sizes neither overlap nor leave [low, high], if they fit at all.

    Args:
      wanted: where each box would like its centre.
      sizes: how long each box is.
      low: lower end of the room.
      high: upper end of the room.

    Returns:
      The centres, in the order given; their order along the axis stays.
    """
    order = sorted(range(len(wanted)), key=lambda box: wanted[box])
    centres = list(wanted)
    end = low
    for box in order:
        centres[box] = max(wanted[box], end + sizes[box] / 2)
        end = centres[box] + sizes[box] / 2
    end = high
    for box in reversed(order):
        centres[box] = min(centres[box], end - sizes[box] / 2)
        end = centres[box] - sizes[box] / 2
    return centres


def render(figure: Figure, name: str, label: str) -> Panel:
    """The drawing as an SVG element, the same bytes for the same input.

    Args:
      figure: the drawing.
      name: prefix of the identifiers inside, different for each panel of a page.
      label: what it shows, for who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    # The first <defs> holds a style sheet that would leak into the page; its content moves to the <svg> element.
    body = text[text.index("</defs>") + len("</defs>") : text.rindex("</svg>")]
    body = re.sub("<[^>]+>", lambda tag: _adapted(tag[0], name), body).strip()
    height = round(figure.get_figheight() * 72)
    spoken = escape(label, quote=True)
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{spoken}" stroke-linejoin="round">'
    return Panel(f"{head}<title>{spoken}</title>{body}</svg>", label)


def _adapted(tag: str, name: str) -> str:
    """One tag with identifiers of its own, the reader's font, and variables in place of the named colours."""
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag).replace("xlink:href", "href")
    tag = tag.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    for variable, (light, _) in COLOURS.items():
        tag = tag.replace(f": {light}", f": var(--{variable}, {light})")
    return tag
