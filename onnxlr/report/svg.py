"""A matplotlib figure as an SVG element for an HTML page, coloured by the page that holds it."""

import importlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from onnxlr.errors import OutputError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The page sets the colours, light or dark. matplotlib draws with stand-ins, each of which becomes
# a variable of the style sheet once the figure is text.
SERIES = 7
_ROLES = ("ink", "muted", "axis", "accent", *(f"series-{i}" for i in range(SERIES)))
STAND_IN = {role: f"#0a0b{i + 1:02x}" for i, role in enumerate(_ROLES)}

_SETTINGS = {
    "axes.edgecolor": STAND_IN["axis"],
    "axes.labelcolor": STAND_IN["muted"],
    "axes.labelsize": 10.5,
    "axes.linewidth": 0.8,
    "font.size": 10.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "onnxlr",
    "text.color": STAND_IN["ink"],
    "text.parse_math": False,
    "xtick.color": STAND_IN["axis"],
    "xtick.labelcolor": STAND_IN["muted"],
    "xtick.labelsize": 10,
    "ytick.color": STAND_IN["axis"],
    "ytick.labelcolor": STAND_IN["muted"],
    "ytick.labelsize": 10,
}


_LOOK = (
    *("axes.", "figure.", "font.", "grid.", "lines.", "markers.", "patch.", "path.", "savefig."),
    *("svg.", "text.", "xtick.", "ytick."),
)


def start_figures() -> None:
    """Import matplotlib without the settings of its user, which don't count here.

    A notebook, for one, names a backend to every process it starts, which need not be installed
    here.

    Raises
    ------
    OutputError
        If it can't be imported.
    """
    name = "matplotlib.backends.backend_svg"  # with the fonts, which it lists in a cache folder
    if name in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    logger = logging.getLogger("matplotlib")  # it complains of settings and homes
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        importlib.import_module(name)
    except Exception as error:
        raise OutputError(f"no figures can be drawn, matplotlib fails: {one_line(error)}") from None
    finally:
        logger.setLevel(level)
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def to_svg(
    draw: Callable[["Figure"], None], size: tuple[int, int], attributes: str, key: str
) -> str:
    """A figure as an SVG element, without a declaration, a namespace, fonts or colours.

    The same figure gives the same text, whatever the user's matplotlib settings.

    Parameters
    ----------
    draw : callable
        Fills an empty figure; its colours are those of ``STAND_IN``.
    size : (int, int)
        Width and height of the view box, in typographic points of the figure.
    attributes : str
        The attributes of the element, as HTML.
    key : str
        The prefix of every identifier within, unique on the page.
    """
    start_figures()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _settings():
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    opening = f'<svg viewBox="0 0 {size[0]} {size[1]}" {attributes}>'
    return opening + _inner(file.getvalue(), key) + "</svg>"


def _settings() -> AbstractContextManager[None]:
    """Set matplotlib's defaults for all that a figure's look depends on, then our settings."""
    import matplotlib

    theirs = matplotlib.rcParamsDefault
    defaults: dict[Any, Any] = {name: theirs[name] for name in theirs if name.startswith(_LOOK)}
    return matplotlib.rc_context(defaults | _SETTINGS)


def _inner(text: str, key: str) -> str:
    """The content of matplotlib's SVG element, without all that a page has no use for."""
    text = text.partition("<svg")[2].partition(">")[2].rpartition("</svg>")[0]
    # A style sheet in a figure would reach the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace("xlink:href", "href")
    needed = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in needed else "", text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{key}-", text)
    # Coordinates to a hundredth: within tags, for the numbers between them are read.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    for role, stand_in in STAND_IN.items():
        text = text.replace(stand_in, f"var(--{role})")
    return re.sub(r"\s*\n\s*", "\n", text)
