"""Calls in threads that are used again: what they raise, what is late, and what ends them."""

import os
import threading
import time
import warnings
from functools import partial

import pytest

from onnxlr.system import aside
from onnxlr.system.aside import call_aside
from onnxlr.system.deadline import Deadline


@pytest.fixture(autouse=True)
def _no_helpers() -> None:
    while aside._IDLE:
        aside._IDLE.pop().end()


def thread_of_a_call() -> int:
    """Which thread makes a call now."""
    found: list[int] = []
    assert call_aside(lambda: found.append(threading.get_ident()), Deadline(60), lambda: None, 1)
    return found[0]


def test_one_thread_makes_many_calls() -> None:
    assert thread_of_a_call() != threading.get_ident()
    assert len({thread_of_a_call() for _ in range(5)}) == 1


def test_calls_within_calls_have_threads_of_their_own() -> None:
    found: list[int] = []

    def outer() -> None:
        found.extend((threading.get_ident(), thread_of_a_call()))

    assert call_aside(outer, Deadline(60), lambda: None, 1)
    assert len({threading.get_ident(), *found}) == 3


def test_what_is_raised_there_is_raised_here() -> None:
    before = thread_of_a_call()
    with pytest.raises(ZeroDivisionError):
        call_aside(lambda: divmod(1, 0), Deadline(60), lambda: None, 1)  # type: ignore[arg-type]
    assert thread_of_a_call() == before


def test_what_is_late_is_stopped_and_its_thread_ends() -> None:
    before, end = thread_of_a_call(), threading.Event()
    late: list[threading.Thread] = []

    def work() -> None:
        late.append(threading.current_thread())
        end.wait(60)

    assert not call_aside(work, Deadline(0.5), end.set, 5)
    assert end.is_set()
    assert late[0].ident == before
    late[0].join(20)
    assert not late[0].is_alive()
    assert thread_of_a_call()


def test_an_interruption_stops_the_work() -> None:
    end = threading.Event()

    class Interrupted(Deadline):
        def wait(self, is_done: object) -> bool:  # noqa: ARG002
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_aside(partial(end.wait, 60), Interrupted(60), end.set, 5)  # type: ignore[arg-type]
    assert end.is_set()


def test_a_thread_without_calls_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "_IDLE_SECONDS", 0.02)
    before = threading.active_count()
    thread_of_a_call()
    ends = time.monotonic() + 20
    while aside._IDLE or threading.active_count() > before:
        assert time.monotonic() < ends
        time.sleep(0.01)
    thread_of_a_call()


def test_what_a_call_held_is_let_go() -> None:
    """Feeds may be large."""
    held: list[object] = [object()]

    class Work:
        def __call__(self) -> None:
            pass

        def __del__(self) -> None:
            held.clear()

    assert call_aside(Work(), Deadline(60), lambda: None, 1)
    assert not held


def test_without_any_more_threads_the_call_is_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert thread_of_a_call() == threading.get_ident()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    thread_of_a_call()
    assert aside._IDLE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            thread_of_a_call()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
