"""The check of ``models.fuzz`` for the reader of models, with bytes that coverage guides.

``python -m models.fuzz.coverage CORPUS -max_total_time=600`` writes the seed models into the folder
CORPUS and lets libFuzzer mutate them: whatever reaches new lines of onnxlr is kept and mutated on.
It stops at the first input that ``onnxlr.inspect`` neither reads nor refuses. It needs ``atheris``
(``pip install atheris``), which nothing else does; flags are libFuzzer's.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from pathlib import Path

import atheris

from tests.support.hostile_seeds import SEEDS

with atheris.instrument_imports(include=["onnxlr", "onnxlr_passes"]):
    import onnxlr
    from onnxlr.errors import OnnxlrError


def once(data: bytes) -> None:
    """Inspect bytes that may be a model."""
    with warnings.catch_warnings(), contextlib.suppress(OnnxlrError):
        warnings.simplefilter("error")
        onnxlr.inspect(data)


def main() -> None:
    """Fill the corpus and start."""
    logging.disable()
    folders = [Path(a) for a in sys.argv[1:] if not a.startswith("-")]
    for folder in folders[:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for name, make in SEEDS.items():
            (folder / name).write_bytes(make().SerializeToString())
    atheris.Setup([*sys.argv, "-timeout=60", "-rss_limit_mb=3000", "-max_len=20000"], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
