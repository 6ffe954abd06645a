"""Command line that checks on mutated models and files that no input breaks onnxlr.

``python -m models.fuzz --seconds 600 --out FOLDER`` makes case after case from a seed: models whose
bytes, fields or graphs are broken, external data, plans, samples, latency tables and cache entries.
Each goes to a few commands in a child process with a limit of memory and time. A find is
whatever is neither success nor one line and its exit code: a traceback, a crash, a hang, memory
without bound, a changed IN, something left behind, or an OUT that doesn't do what IN did. The first
find at each place is kept in FOLDER, and the command ends with an error. A model that by
itself takes long for a single run is called slow, not a find: commands run it many times.

``--number N`` runs one case again and keeps its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import click
from google.protobuf.message import DecodeError, EncodeError

from models.fuzz.cases import IN, Sound, make_case
from models.fuzz.run import Verdict, fork_trials, lay_out, one_run, run_case, shorten, sound_files
from models.reference.files import tell_table

_SLOW, _LONG_RUN = 0.4, 20  # seconds of one run: what a command of many runs may take long for
_A_CHILD = 25  # cases, after which a fresh process takes over
_MEMORY = 3 << 30


@dataclass
class Tally:
    """The number of cases by kind and verdict, and the numbers of the finds by place."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    finds: dict[str, list[int]] = field(default_factory=dict)

    def add(self, kind: str, verdict: Verdict, number: int) -> bool:
        """Count a case, and return whether it is the first find at its place."""
        self.counts.setdefault(kind, Counter())[verdict.word] += 1
        if verdict.word != "find":
            return False
        numbers = self.finds.setdefault(verdict.place, [])
        numbers.append(number)
        return len(numbers) == 1


class Supervisor:
    """Runs cases in forked children, one after another, and knows which one took a child down."""

    def __init__(self, seed: int, out: Path, sound: Sound, patience: float) -> None:
        self.tally = Tally()
        self._seed, self._out, self._sound, self._patience = seed, out, sound, patience

    def run(self, first: int, until: float, most: int) -> int:
        """Run cases from this number on, and return the number after the last."""
        number = first
        while time.monotonic() < until and number < first + most:
            number = self._child(number, until, first + most)
        return number

    def _child(self, first: int, until: float, end: int) -> int:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            with os.fdopen(write, "w", buffering=1) as reports:
                self._work(first, min(end, first + _A_CHILD), until, reports)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb", buffering=0) as reports:
            return self._watch(pid, reports, first)

    def _work(self, first: int, end: int, until: float, reports: TextIO) -> None:
        """Run case after case in the child, and announce each step before it begins."""
        fork_trials()
        os.setsid()  # with all that the case starts, so that all of it can be stopped
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with (self._out / "stderr.txt").open("w") as errors:
            os.dup2(errors.fileno(), 2)
        for number in range(first, end):
            if time.monotonic() > until:
                break

            def tell(**what: Any) -> None:
                reports.write(json.dumps(what) + "\n")

            tell(number=number, step="make", kind="", folder="")
            try:
                case = make_case(self._seed, number, self._sound)
            except (DecodeError, EncodeError):  # deeper than protobuf goes
                tell(done=True, kind="none made", verdict=["passed", "", ""])
                continue
            folder = Path(tempfile.mkdtemp(prefix=f"case-{number}-", dir=self._out))
            lay_out(case, folder)
            tell(number=number, step="start", kind=case.kind, folder=str(folder))
            verdict = run_case(case, folder, lambda step: tell(step=step))
            tell(done=True, verdict=[verdict.word, verdict.place, verdict.words])

    def _watch(self, pid: int, reports: Any, first: int) -> int:
        state: dict[str, Any] = {"number": first, "kind": "", "step": "start", "folder": ""}
        rest, busy, late = b"", False, False
        while True:
            ready, _, _ = select.select([reports], [], [], self._patience)
            if not ready:
                late = True
                break
            chunk = os.read(reports.fileno(), 1 << 16)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                said = json.loads(line)
                busy = True
                state |= said
                if said.get("done"):
                    busy = False
                    self._book(state, Verdict(*said["verdict"]))
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if busy:
            self._book(state, self._lost(state, status, late))
        return int(state["number"]) + 1

    def _lost(self, state: dict[str, Any], status: int, late: bool) -> Verdict:
        """Return the verdict on a case that ended its process, or didn't end."""
        step = state["step"]
        if late and state["folder"] and _is_slow(Path(state["folder"]) / IN):
            return Verdict("slow", "", f"{step}: a single run of the model takes long")
        code = os.waitstatus_to_exitcode(status)
        how = f"hangs for more than {self._patience:g} s" if late else _signal(code)
        with contextlib.suppress(OSError):
            said = (self._out / "stderr.txt").read_text(errors="replace").strip()
            how += f": {shorten(said)}" if said and not late else ""
        if step.startswith("oracle"):  # the fuzzer looked at IN here, not onnxlr
            return Verdict("passed", "", f"{step}: {how}")
        return Verdict("find", f"{step}: {how}", how)

    def _book(self, state: dict[str, Any], verdict: Verdict) -> None:
        number, folder = int(state["number"]), state["folder"]
        if self.tally.add(state["kind"], verdict, number):
            click.echo(
                f"find {number} ({state['kind']}): {verdict.place}\n    {verdict.words[:300]}"
            )
            target = self._out / f"find-{number}"
            shutil.rmtree(target, ignore_errors=True)
            if folder:
                shutil.move(folder, target)
            else:
                target.mkdir()
            (target / "why.txt").write_text(f"{verdict.place}\n{verdict.words}\n", encoding="utf-8")
        elif folder:
            shutil.rmtree(folder, ignore_errors=True)


def _is_slow(path: Path) -> bool:
    """Return whether one run of the model alone takes more than a moment."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(_LONG_RUN)
        started = time.monotonic()
        one_run(path.absolute())
        os._exit(time.monotonic() - started > _SLOW)
    return os.waitpid(pid, 0)[1] != 0


def _signal(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def table(tally: Tally) -> list[str]:
    """Return the counts by kind, and the finds by place, as lines of Markdown."""
    words = ("passed", "refused", "slow", "find")
    lines = [
        "| input | cases | written | refused | slow models | finds |",
        "| --- |" + " ---: |" * 5,
    ]
    total: Counter[str] = Counter()
    for kind, counts in sorted(tally.counts.items()):
        total += counts
        row = " | ".join(str(counts[w]) for w in words)
        lines.append(f"| {kind} | {counts.total()} | {row} |")
    row = " | ".join(str(total[w]) for w in words)
    lines.append(f"| all | {total.total()} | {row} |")
    if tally.finds:
        lines += ["", "| find | times | first case |", "| --- | ---: | ---: |"]
        by_count = sorted(tally.finds.items(), key=lambda item: -len(item[1]))
        lines += [f"| {place[:200]} | {len(n)} | {n[0]} |" for place, n in by_count]
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the finds.")
@click.option("--seconds", type=click.FloatRange(0), default=600.0, help="How long.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of all cases.")
@click.option("--first", type=click.IntRange(0), default=0, help="Number of the first case.")
@click.option("--patience", type=click.FloatRange(1), default=60.0, help="Seconds a command has.")
@click.option("--number", type=click.IntRange(0), help="Run only this case, and keep its files.")
@click.option("--markdown", type=click.Path(path_type=Path), help="File for the table.")
def main(
    out: Path,
    seconds: float,
    seed: int,
    first: int,
    patience: float,
    number: int | None,
    markdown: Path | None,
) -> None:
    """Feed the command broken models and files, and tell what breaks it."""
    out.mkdir(parents=True, exist_ok=True)
    sound = sound_files()
    if number is not None:
        folder = out / f"case-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case = make_case(seed, number, sound)
        lay_out(case, folder)
        click.echo(f"{case.kind}: {', '.join(case.commands)}")
        verdict = run_case(case, folder, lambda step: click.echo(step), keep=True)
        click.echo(f"{verdict.word}: {verdict.place}\n{verdict.words}")
        return
    supervisor = Supervisor(seed, out, sound, patience)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # the table shows the finds until then
        supervisor.run(first, time.monotonic() + seconds, sys.maxsize)
    click.echo(f"from case {first} of seed {seed}")
    tell_table(table(supervisor.tally), markdown)
    if supervisor.tally.finds:
        sys.exit(1)


if __name__ == "__main__":
    main()
