"""English text for the zoo's samples, and its pieces as BERT reads them."""

from __future__ import annotations

import pydoc_data.topics
import re


def prose() -> str:
    """Return English prose that every Python carries: the topics of its built-in help."""
    return re.sub(r"[*`_\"|=]+", "", "\n".join(pydoc_data.topics.topics.values()))


def word_pieces(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Return the ids of a text by WordPiece (Wu et al. 2016): the longest piece of a word first."""
    ids = []
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
        ids += pieces
    return ids
