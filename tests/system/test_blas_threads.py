"""Linear algebra on one thread: while anybody needs it, and as it was before once nobody does."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from onnxlr.system.blas_threads import one_blas_thread


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    with threadpool_limits(2, user_api="blas"):
        yield


def threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {row["num_threads"] for row in threadpool_info() if row["user_api"] == "blas"}


def test_the_last_one_puts_it_back() -> None:
    begun, go_on = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def other() -> None:
        with one_blas_thread():
            begun.set()
            go_on.wait(10)
            seen.append(threads())

    before = threads()
    assert before == {2}
    with one_blas_thread():
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(10)
    go_on.set()  # the first is through, the second is not
    thread.join()
    assert seen == [{1}]
    assert threads() == before


def test_within_one_another() -> None:
    before = threads()
    with one_blas_thread(), one_blas_thread():
        assert threads() == {1}
    assert threads() == before
