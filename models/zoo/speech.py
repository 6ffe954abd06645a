"""Speech for the zoo's samples: recorded where the clips are installed, else synthesised."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.zoo.models import ZooError

Floats = NDArray[np.float32]

_CLIPS = Path("/usr/share/pocketsphinx/test/data")  # Debian's package pocketsphinx-testdata
RATE = 16_000  # Hz, of the clips and of all the speech models but basic-pitch


def _clips() -> list[Path]:
    return sorted(_CLIPS.glob("*/*.wav"))


def speech_words() -> str:
    """Return where the speech comes from."""
    return "recorded speech" if _clips() else "synthesised voice"


def load_speech(seed: int) -> Floats:
    """Return all clips in a row, or a minute of synthesised voice if there are none: (t,)."""
    if not _clips():
        return _synthesised_voice(60, seed)
    parts = []
    for clip in _clips():
        with wave.open(str(clip)) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
                raise ZooError(f"{clip} is not 16 kHz, mono, 16 bit: remove it")
            parts.append(np.frombuffer(file.readframes(file.getnframes()), "<i2"))
    return np.concatenate(parts).astype(np.float32) / np.float32(32768)


def _synthesised_voice(seconds: int, seed: int) -> Floats:
    """Return syllables: harmonics of a gliding pitch under two formants, with pauses and noise."""
    rng = np.random.default_rng(seed)
    parts: list[NDArray[np.float64]] = []
    while sum(map(len, parts)) < seconds * RATE:
        time = np.arange(int(rng.uniform(0.1, 0.5) * RATE)) / RATE
        glide = np.linspace(1, rng.uniform(0.8, 1.25), len(time))
        pitch = rng.uniform(90, 280) * glide * (1 + 0.02 * np.sin(2 * np.pi * 5.5 * time))
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        formants = rng.uniform(300, 900), rng.uniform(900, 2600)
        sound = np.zeros_like(time)
        for k in range(1, int(4000 / pitch.max()) + 1):
            weight = sum(np.exp(-(((k * pitch - f) / 250) ** 2)) for f in formants)
            sound += (weight + 0.05 / k) * np.sin(k * phase)
        sound *= np.hanning(len(time)) * rng.uniform(0.05, 0.2)
        pause = np.zeros(int(rng.uniform(0, 0.4) ** 2 * RATE))
        parts += [sound + rng.normal(0, 0.05, len(time)) * np.abs(sound), pause]
    voice = np.concatenate(parts)[: seconds * RATE]
    return (voice + rng.normal(0, 1e-3, len(voice))).astype(np.float32)


def cut_windows(sound: Floats, length: int, count: int) -> Floats:
    """Return evenly spread windows of a sound: (count, length)."""
    starts = np.linspace(0, len(sound) - length, count).astype(int)
    return np.stack([sound[s : s + length] for s in starts])
