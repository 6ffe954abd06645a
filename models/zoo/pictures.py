"""Pictures for the zoo's samples: photos, and drawn lines of text."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.zoo.models import Package, ZooError
from models.zoo.text import prose

_PHOTOS = Package("foolbox", "3.3.4", "*/imagenet_*.jpg")
# Not the two display faces, whose names end in y: they hold next to no letters.
_FONTS = Package("matplotlib", "3.10.8", "*/DejaVuS*[!y].ttf")
MOST_LINES = 10  # on one page


def _pillow(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError:
        raise ZooError(
            "photos and text are read and drawn with Pillow: pip install pillow, or use --synthetic"
        ) from None


def load_photos(
    cache: Path, seed: int, size: int, square: Callable[[Any], Any]
) -> NDArray[np.uint8]:
    """Return 20 photos, each whole and cropped, plain and mirrored: (80, size, size, 3), RGB."""
    image = _pillow("Image")
    rng = np.random.default_rng(seed)
    pictures = []
    for file in sorted(_PHOTOS.fetch(cache).rglob("*.jpg")):
        whole = image.open(file).convert("RGB")
        share = rng.uniform(0.5, 0.9)
        width, height = round(whole.width * share), round(whole.height * share)
        x, y = rng.integers(whole.width - width + 1), rng.integers(whole.height - height + 1)
        cropped = whole.crop((int(x), int(y), int(x) + width, int(y) + height))
        for photo in (whole, cropped):
            pixels = np.asarray(square(photo).resize((size, size), image.Resampling.BILINEAR))
            pictures += [pixels, pixels[:, ::-1]]
    return np.stack(pictures)


def draw_text(
    cache: Path, rng: np.random.Generator, size: tuple[int, int], lines: int
) -> tuple[NDArray[np.uint8], list[str], NDArray[np.float64]]:
    """Draw words and numbers in random type, ink and paper, with noise.

    Returns
    -------
    ndarray of shape (height, width, 3)
    list of str
        The lines.
    ndarray of shape (10, 4)
        The boxes that they fill: left, top, right, bottom; zeros beyond the last.
    """
    image, draw, fonts = (_pillow(name) for name in ("Image", "ImageDraw", "ImageFont"))
    faces = sorted(_FONTS.fetch(cache).rglob("*.ttf"))
    words = sorted(set(re.findall(r"\b[A-Za-z]{2,12}\b", prose())))
    dark, light = rng.integers(0, 100, 3), rng.integers(150, 256, 3)
    paper, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
    picture = image.new("RGB", size, tuple(int(c) for c in paper))
    pen = draw.Draw(picture)
    top = 0.0
    written: list[str] = []
    boxes = np.zeros((MOST_LINES, 4))
    for _ in range(lines):
        room = size[1] / lines
        letter = int(room * rng.uniform(0.5, 0.75))
        font = fonts.truetype(str(faces[rng.integers(len(faces))]), letter)
        text = ""
        while True:
            number = str(rng.integers(10 ** rng.integers(1, 6)))
            word = number if rng.random() < 0.3 else words[rng.integers(len(words))]
            longer = f"{text} {word}".strip()
            if text and font.getlength(longer) > size[0] * 0.95:
                break
            text = longer
        where = (int(rng.integers(2, 10)), int(top + rng.uniform(0, room - letter * 1.2)))
        pen.text(where, text, tuple(int(c) for c in ink), font)
        boxes[len(written)] = pen.textbbox(where, text, font)
        written.append(text)
        top += room
    noisy = np.asarray(picture) + rng.normal(0, rng.uniform(0, 12), (size[1], size[0], 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), written, boxes
