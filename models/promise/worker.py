"""One process of the experiment: runs ``onnxlr.optimize`` on re-splits and writes a row for each.

It is run as a file, by any interpreter that has a version of onnxlr installed, so that two of them
can be compared: ``python worker.py FOLDER TASKS ROWS``. Nothing else from here is imported.
"""

import inspect
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["ONNXLR_TRIAL"] = "off"  # the models are known to run

import numpy as np
import onnxruntime

import onnxlr

_BATCH = 500


def outputs(model: Path | bytes, images: np.ndarray) -> np.ndarray:
    """What a model gives for images, flat, a row for each."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    parts = [
        session.run(None, {name: images[i : i + _BATCH]})[0] for i in range(0, len(images), _BATCH)
    ]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def true_loss(metric: str, before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> float:
    """What a model loses on all samples that weren't given, from both models' outputs on them."""
    if metric == "top1":
        right = [(y.argmax(axis=1) == labels).mean() for y in (before, after)]
        return float(right[0] - right[1])
    before, after = before.astype(np.float64), after.astype(np.float64)
    if metric == "rel-error":
        spread = np.linalg.norm(before - before.mean(axis=0))
        return float(np.linalg.norm(before - after) / spread)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return float(1 - ((before * after).sum(axis=1) / norms).mean())


def run(task: dict[str, Any], folder: Path, before: np.ndarray) -> dict[str, Any]:
    """One re-split: optimize on what is given, and measure the loss on all else."""
    images, labels = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("image", "label"))
    size = min(task["population"], len(images))
    order = np.random.default_rng(task["repeat"]).permutation(size)
    given, others = np.sort(order[: task["given"]]), np.sort(order[task["given"] :])
    model = Path(task["model"])
    options = {"metric": task["metric"], "max_drop": task["limit"], "seed": task["repeat"]}
    if task["metric"] == "top1":
        options["labels"] = "label"
    known = inspect.signature(onnxlr.optimize).parameters
    options |= {n: v for n, v in task["options"].items() if n in known}  # of both versions
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "given.npz", Path(scratch) / "out.onnx"
        name = onnxruntime.InferenceSession(str(model)).get_inputs()[0].name
        np.savez(data, **{name: images[given]}, label=labels[given])
        result = onnxlr.optimize(model, out, data=data, jobs=1, measure=False, **options)
        after = outputs(out, images[others])
    report = result.report.to_dict()
    values = report["metric"]
    worse = values["original"] - values["optimized"]
    return {
        **{n: task[n] for n in ("key", "name", "metric", "given", "limit", "repeat")},
        "confidence": values.get("confidence"),
        "reported": -worse if task["metric"] == "rel-error" else worse,
        "loss": true_loss(task["metric"], before[others], after, labels[others]),
        "replaced": sum(row["decision"] != "keep" for row in report["layers"]),
        "macs": report["output"]["macs"] / report["input"]["macs"],
        "ms": _predicted(report),
        "seconds": report["seconds"],
    }


def _predicted(report: dict[str, Any]) -> float:
    """The layers' milliseconds after over before, as the latency table has them."""
    before = after = 0.0
    for row in report["layers"]:
        ms = next((o["before_ms"] for o in row["alternatives"] if o["before_ms"]), None)
        ms = row["before_ms"] or ms
        if ms:
            before += ms
            after += row["after_ms"] or ms
    return after / before if before else 1.0


def main() -> None:
    """Run the tasks of a file, one JSON object a line; append a row for each to another file.

    A run that fails is told and has no row; the others go on.
    """
    folder, tasks, rows = (Path(word) for word in sys.argv[1:4])
    os.environ["ONNXLR_CACHE"] = "off"
    parent = os.getppid()
    answers: dict[str, np.ndarray] = {}
    failed = False
    for line in tasks.read_text(encoding="utf-8").splitlines():
        if os.getppid() != parent:  # killed: nobody would end this process
            break
        task = json.loads(line)
        try:
            if task["model"] not in answers:
                images = np.load(folder / "image.npy", mmap_mode="r")[: task["population"]]
                answers[task["model"]] = outputs(Path(task["model"]), images)
            row = run(task, folder, answers[task["model"]])
        except Exception as error:  # whatever it is, the other runs are worth having
            print(f"{task['key']}: {type(error).__name__}: {error}", file=sys.stderr)
            failed = True
            continue
        with rows.open("a", encoding="utf-8") as file:  # at once: a run that is stopped goes on
            file.write(json.dumps(row) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
