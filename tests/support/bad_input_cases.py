"""Commands that must be refused: what is wrong, the exit code, and the words of the one line."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.support.bad_input_files import (
    Setup,
    arrays_file,
    changed,
    changed_plan,
    changed_row,
    corrupt_archive,
    cycle,
    discard,
    edited,
    external,
    network,
    no_inputs,
    nothing,
    npy_under,
    one_by_one,
    renamed_output,
    sample,
    save,
    sequence,
    set_opset,
    text_file,
    two_inputs,
    undefined_input,
    unknown_op,
    weight,
    without_input,
)
from tests.support.builders import node

OPTIMIZE = "optimize in.onnx out.onnx"


APPLY = "apply plan.json in.onnx out.onnx"


@dataclass(frozen=True)
class Case:
    """A command that must be refused, and the words that its one line must hold."""

    name: str
    setup: Setup
    command: str
    code: int
    words: tuple[str, ...]


def _case(name: str, setup: Setup, command: str, code: int, *words: str) -> Case:
    return Case(name, setup, command, code, words)


_DATA = f"{OPTIMIZE} --data data.npz"


MODELS = [
    _case("no-such-file", lambda: Path("in.onnx").unlink(), OPTIMIZE, 1, "in.onnx", "no such file"),
    _case("folder", nothing, "optimize folder out.onnx", 1, "folder", ".onnx file in it"),
    _case("empty", edited(lambda _: b""), OPTIMIZE, 1, "in.onnx", "empty", "0 bytes"),
    _case("truncated", edited(lambda b: b[:-200]), OPTIMIZE, 1, "in.onnx", "cut short"),
    _case("text", text_file("in.onnx", "hello, world\n" * 9), OPTIMIZE, 1, "not an ONNX model"),
    _case(
        "random-bytes",
        edited(lambda _: np.random.default_rng(0).bytes(5000)),
        OPTIMIZE,
        1,
        "not an ONNX model",
    ),
    _case("future-opset", set_opset(9999), OPTIMIZE, 1, "opset 9999", "upgrade"),
    _case("old-opset", set_opset(6), OPTIMIZE, 1, "opset 6", "oldest", "7", "convert"),
    _case(
        "future-ir",
        changed(lambda m: setattr(m, "ir_version", 999)),
        OPTIMIZE,
        1,
        "IR version 999",
        "upgrade",
    ),
    _case("external-missing", external("gone.data"), OPTIMIZE, 1, "w1", "gone.data", "missing"),
    _case("external-cut", external(cut=96), OPTIMIZE, 1, "w1", "4,000", "4,096", "cut short"),
    _case("external-cut-unsized", external(cut=96, length=""), OPTIMIZE, 1, "w1"),
    _case(
        "external-cut-unsized-inspect",
        external(cut=96, length=""),
        "inspect in.onnx",
        1,
        "in.data",
        "cut short",
    ),
    _case("external-parent", external("../w.data"), OPTIMIZE, 1, "../w.data", "outside"),
    _case("external-absolute", external("/etc/passwd"), OPTIMIZE, 1, "/etc/passwd", "outside"),
    _case("external-dot", external("."), OPTIMIZE, 1, "w1", "'.'"),
    _case("external-nowhere", external("x", location=""), OPTIMIZE, 1, "w1", "''"),
    _case("external-offset-text", external(offset="abc"), OPTIMIZE, 1, "w1", "abc"),
    _case("external-offset-negative", external(offset="-8"), OPTIMIZE, 1, "w1", "-8"),
    _case("custom-op", unknown_op("Mine", "my.domain"), OPTIMIZE, 1, "in.onnx", "can't open"),
    _case("made-up-op", unknown_op("Bogus", ""), OPTIMIZE, 1, "in.onnx", "Bogus"),
    _case(
        "made-up-op-unverified",
        unknown_op("Bogus", ""),
        f"{OPTIMIZE} --rank 4 --verify none",
        1,
        "in.onnx",
        "Bogus",
    ),
    _case("missing-input", without_input(0), OPTIMIZE, 1, "in.onnx"),
    _case("missing-input-unverified", without_input(0), f"{OPTIMIZE} --verify none", 1, "in.onnx"),
    _case("undefined-input", changed(undefined_input), OPTIMIZE, 1, "in.onnx", "nowhere"),
    _case(
        "undefined-input-inspect",
        changed(undefined_input),
        "inspect in.onnx",
        1,
        "in.onnx",
        "nowhere",
    ),
    _case("cycle", changed(cycle), OPTIMIZE, 1, "in.onnx"),
    _case("cycle-inspect", changed(cycle), "inspect in.onnx", 1, "in.onnx"),
    _case(
        "same-output-twice",
        changed(lambda m: m.graph.node.append(node("Relu", ["h"], "y"))),
        "inspect in.onnx",
        1,
        "in.onnx",
        "'y'",
    ),
    _case(
        "short-weight",
        changed(
            lambda m: setattr(
                m.graph.initializer[0], "raw_data", m.graph.initializer[0].raw_data[:-8]
            )
        ),
        "inspect in.onnx",
        1,
        "in.onnx",
        "w1",
    ),
    _case(
        "nan-weight",
        lambda: save(weight("w1", np.full((32, 32), np.nan, np.float32))),
        OPTIMIZE,
        1,
        "w1",
        "fc1",
        "1024",
        "NaN",
    ),
    _case(
        "inf-weight",
        lambda: save(weight("w2", np.where(np.eye(32, 8) > 0, np.inf, sample(32, 8)))),
        f"{OPTIMIZE} --verify none",
        1,
        "w2",
        "fc2",
        "8 NaN or infinite values out of 256",
    ),
]


DATA = [
    _case("data-missing", nothing, f"{OPTIMIZE} --data no.npz", 1, "no.npz", "no such file"),
    _case("data-other-file", nothing, f"{OPTIMIZE} --data in.onnx", 1, "neither .npz nor .npy"),
    _case("data-wrong-name", arrays_file(z=sample(6, 32)), _DATA, 1, "data.npz", "'x'", "has z"),
    _case("data-wrong-shape", arrays_file(x=sample(6, 31)), _DATA, 1, "[6, 31]", "31, not 32"),
    _case("data-wrong-rank", arrays_file(x=sample(6)), _DATA, 1, "[6]", "x float32[n, 32]"),
    _case(
        "data-high-rank",
        arrays_file(x=sample(6, 2, 3, 32)),
        _DATA,
        1,
        "[6, 2, 3, 32]",
        "first axis",
    ),
    _case(
        "data-wrong-dtype",
        arrays_file(x=sample(6, 32).astype(np.float64)),
        _DATA,
        1,
        "float64",
        "astype",
    ),
    _case("data-objects", arrays_file(x=np.array([{}, {}])), _DATA, 1, "data.npz", "can't read"),
    _case("data-no-samples", arrays_file(x=sample(0, 32)), _DATA, 1, "no samples"),
    _case(
        "data-garbage", text_file("data.npz", "garbage" * 50), _DATA, 1, "data.npz", "can't read"
    ),
    _case("data-empty-file", text_file("data.npz", ""), _DATA, 1, "data.npz", "can't read"),
    _case("data-cut-short", edited(lambda b: b[:400], "data.npz"), _DATA, 1, "data.npz"),
    _case(
        "data-corrupt",
        lambda: corrupt_archive("data.npz"),
        _DATA,
        1,
        "data.npz",
        "can't read",
    ),
    _case("data-npy-named-npz", lambda: npy_under("data.npz"), _DATA, 1, "data.npz"),
    _case(
        "data-npz-named-npy",
        lambda: discard(Path("data.npz").rename("data.npy")),
        f"{OPTIMIZE} --data data.npy",
        1,
        "data.npy",
    ),
    _case("data-npy-two-inputs", two_inputs, f"{OPTIMIZE} --data data.npy", 1, "2 inputs", "x, z"),
    _case(
        "data-sample-counts",
        one_by_one(two_inputs, arrays_file(x=sample(6, 32), z=sample(5, 32))),
        _DATA,
        1,
        "x 6",
        "z 5",
    ),
    _case("data-no-inputs", no_inputs, _DATA, 1, "no inputs"),
    _case("data-empty-folder", nothing, f"{OPTIMIZE} --data folder", 1, "folder", ".npz"),
    _case("validation-missing", nothing, f"{_DATA} --validation no.npz", 1, "no.npz"),
    _case("validation-alone", nothing, f"{OPTIMIZE} --validation data.npz", 2, "--data"),
    _case(
        "validation-unverified",
        nothing,
        f"{OPTIMIZE} --validation data.npz --verify none",
        2,
        "--validation",
    ),
    _case("labels-missing", nothing, f"{_DATA} --labels nothere", 1, "'nothere'", "label, x"),
    _case(
        "labels-shape",
        arrays_file(x=sample(6, 32), label=np.zeros((6, 2), np.int64)),
        f"{_DATA} --labels label",
        1,
        "int64[6, 2]",
        "6 integers",
        ".argmax(1)",
    ),
    _case(
        "labels-float",
        arrays_file(x=sample(6, 32), label=np.zeros(6)),
        f"{_DATA} --labels label",
        1,
        "float64[6]",
        "integers",
        ".astype('int64')",
    ),
    _case(
        "labels-text",
        arrays_file(x=sample(6, 32), label=np.array(list("abcabc"))),
        f"{_DATA} --labels label",
        1,
        "<U1[6]",
        "6 integers",
        "number of each one's class",
    ),
    _case("labels-alone", nothing, f"{OPTIMIZE} --labels label", 2, "--labels", "--data"),
    _case("labels-unverified", nothing, f"{OPTIMIZE} --labels label --verify none", 2, "--labels"),
    _case("top1-without-labels", nothing, f"{_DATA} --metric top1", 1, "top1", "--labels"),
    _case("metric-unknown", nothing, f"{OPTIMIZE} --metric f1", 2, "'f1'", "top1, agreement"),
    _case(
        "metric-no-module",
        nothing,
        f"{OPTIMIZE} --metric no_such_mod:f",
        2,
        "no_such_mod",
        "import",
    ),
    _case("metric-no-function", nothing, f"{OPTIMIZE} --metric json:nope", 2, "json:nope", "nope"),
    _case("metric-no-callable", nothing, f"{OPTIMIZE} --metric json:__name__", 2, "no", "function"),
    _case("metric-relative", nothing, f"{OPTIMIZE} --metric .m:f", 2, "'.m:f'", "import"),
    _case(
        "metric-module-fails",
        text_file("bad_import_metric.py", "raise RuntimeError('broken module')\n"),
        f"{OPTIMIZE} --metric bad_import_metric:f",
        2,
        "bad_import_metric:f",
        "broken module",
    ),
    _case(
        "metric-syntax-error",
        text_file("bad_syntax_metric.py", "def f(:\n"),
        f"{OPTIMIZE} --metric bad_syntax_metric:f",
        2,
        "bad_syntax_metric:f",
        "import",
    ),
    _case(
        "metric-raises",
        text_file("bad_raising_metric.py", "def f(s):\n    raise ValueError('no pictures')\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_raising_metric:f",
        1,
        "bad_raising_metric:f",
        "no pictures",
    ),
    _case(
        "metric-no-number",
        text_file("bad_none_metric.py", "def f(s):\n    return None\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_none_metric:f",
        1,
        "bad_none_metric:f",
    ),
    _case(
        "metric-nan",
        text_file("bad_nan_metric.py", "def f(s):\n    return float('nan')\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_nan_metric:f",
        1,
        "bad_nan_metric:f",
        "nan",
    ),
    _case(
        "metric-exits",
        text_file("bad_exit_metric.py", "import sys\ndef f(s):\n    sys.exit(0)\n"),
        f"{OPTIMIZE} --rank 4 --metric bad_exit_metric:f",
        1,
        "bad_exit_metric:f",
    ),
]


OUTPUTS = [
    _case("out-is-in", nothing, "optimize in.onnx in.onnx", 2, "same file", "in.onnx"),
    _case("out-is-in-path", nothing, "optimize in.onnx folder/../in.onnx", 2, "same file"),
    _case(
        "out-is-in-symlink",
        lambda: Path("link.onnx").symlink_to("in.onnx"),
        "optimize in.onnx link.onnx",
        2,
        "same file",
    ),
    _case(
        "out-is-in-hard-link",
        lambda: Path("link.onnx").hardlink_to("in.onnx"),
        "optimize in.onnx link.onnx",
        2,
        "same file",
    ),
    _case("apply-out-is-in", nothing, "apply plan.json in.onnx in.onnx", 2, "same file"),
    _case("out-is-plan", nothing, "apply plan.json in.onnx plan.json", 2, "plan.json"),
    _case("out-is-data", nothing, "optimize in.onnx data.npz --data data.npz", 2, "data.npz"),
    _case(
        "out-is-validation",
        lambda: discard(Path("val.npz").write_bytes(Path("data.npz").read_bytes())),
        "optimize in.onnx val.npz --data data.npz --validation val.npz",
        2,
        "val.npz",
    ),
    _case(
        "out-is-external-data",
        external(),
        "optimize in.onnx in.data --rank 4 --verify none",
        2,
        "in.data",
    ),
    _case("out-no-folder", nothing, "optimize in.onnx no/out.onnx", 1, "no", "doesn't exist"),
    _case("out-read-only", nothing, "optimize in.onnx /proc/out.onnx", 1, "/proc"),
    _case("out-folder", nothing, "optimize in.onnx folder", 1, "folder", "name a file in it"),
    _case("out-fifo", lambda: os.mkfifo("pipe"), "optimize in.onnx pipe", 1, "not a regular file"),
    _case("out-long-name", nothing, f"optimize in.onnx {'n' * 300}", 1, "name too long"),
    _case("in-fifo", lambda: os.mkfifo("pipe"), "optimize pipe out.onnx", 1, "not a regular file"),
    _case("plan-is-out", nothing, f"{OPTIMIZE} --plan-out out.onnx", 2, "out.onnx", "two outputs"),
    _case(
        "plan-is-out-path", nothing, f"{OPTIMIZE} --plan-out folder/../out.onnx", 2, "two outputs"
    ),
    _case("plan-is-in", nothing, f"{OPTIMIZE} --plan-out in.onnx", 2, "in.onnx", "same file"),
    _case("plan-is-json", nothing, f"{OPTIMIZE} --plan-out a.json --json a.json", 2, "a.json"),
    _case("json-is-in", nothing, f"{OPTIMIZE} --json in.onnx", 2, "in.onnx", "same file"),
    _case("json-is-data", nothing, f"{_DATA} --json data.npz", 2, "data.npz"),
    _case("json-no-folder", nothing, f"{OPTIMIZE} --json no/r.json", 1, "no", "doesn't exist"),
    _case("plan-no-folder", nothing, f"{OPTIMIZE} --plan-out no/p.json", 1, "no", "doesn't exist"),
    _case("inspect-json-is-in", nothing, "inspect in.onnx --json in.onnx", 2, "in.onnx"),
    _case("inspect-json-no-folder", nothing, "inspect in.onnx --json no/r.json", 1, "no/r.json"),
    _case("bench-json-is-in", nothing, "bench in.onnx --seconds 0.05 --json in.onnx", 2, "in.onnx"),
    _case(
        "compare-json-is-b",
        lambda: save(network(), "b.onnx"),
        "compare in.onnx b.onnx --json b.onnx",
        2,
        "b.onnx",
    ),
]


_FEW = [
    _case("rank-of-none", nothing, f"{OPTIMIZE} --rank 8,4,2", 2, "8,4,2", "3 numbers", "tucker2"),
    *(
        _case(f"rank-{text or 'empty'}", nothing, f"{OPTIMIZE} --rank={text}", 2, "--rank", "auto")
        for text in (
            "",
            "0",
            "-3",
            "1.5",
            "energy:2",
            "energy:0",
            "abc",
            "8,4,2,1",
            "8,",
            "8,0",
            "nan",
            "0.0",
            "1e3",
        )
    ),
    *(
        _case(f"shape-{text}", nothing, f"{OPTIMIZE} --shape {text}", 2, "--shape", text)
        for text in ("x", "x:", "x:a,32", "x:0,32", "x:00,32", "x:-1,32", "x:1;32", "x:1,", "1,32")
    ),
]


FLAGS = [
    *_FEW,
    _case("rank-huge", nothing, f"{OPTIMIZE} --rank {'9' * 400}", 2, "--rank"),
    _case("rank-too-long", nothing, f"{OPTIMIZE} --rank {'9' * 5000}", 2, "--rank"),
    _case("shape-unknown-input", nothing, f"{OPTIMIZE} --shape z:1,32", 2, "'z'", "x float32"),
    _case("shape-axes", nothing, f"{OPTIMIZE} --shape x:1,2,32", 2, "x:1,2,32", "[n, 32]"),
    _case("shape-contradicts", nothing, f"{OPTIMIZE} --shape x:1,33", 2, "x:1,33", "[n, 32]"),
    _case("shape-huge", nothing, f"{OPTIMIZE} --shape x:{'9' * 20},32", 2, "--shape", "9" * 20),
    _case("shape-with-data", nothing, f"{_DATA} --shape x:1,32", 2, "--shape", "--data"),
    _case("method-unknown", nothing, f"{OPTIMIZE} --method magic", 2, "'magic'", "svd"),
    _case("max-drop-negative", nothing, f"{OPTIMIZE} --max-drop -0.1", 2, "--max-drop", "-0.1"),
    _case("max-drop-percent", nothing, f"{OPTIMIZE} --max-drop 5", 2, "for 5 points write 0.05"),
    _case("max-drop-nan", nothing, f"{OPTIMIZE} --max-drop nan", 2, "--max-drop", "nan"),
    _case("max-drop-text", nothing, f"{OPTIMIZE} --max-drop few", 2, "--max-drop", "few"),
    _case("threads-0", nothing, f"{OPTIMIZE} --threads 0", 2, "--threads 0", "at least 1"),
    _case("threads-huge", nothing, f"{OPTIMIZE} --threads {10**12}", 2, "--threads"),
    _case("batch-0", nothing, f"{OPTIMIZE} --batch 0", 2, "--batch 0", "at least 1"),
    _case("batch-huge", nothing, f"{OPTIMIZE} --batch {10**20}", 2, "--batch"),
    _case("batch-0-inspect", nothing, "inspect in.onnx --batch 0", 2, "--batch 0"),
    _case("seed-negative", nothing, f"{OPTIMIZE} --seed -1", 2, "--seed", "-1"),
    _case("seconds-0", nothing, "bench in.onnx --seconds 0", 2, "--seconds"),
    _case("seconds-nan", nothing, "bench in.onnx --seconds nan", 2, "--seconds", "nan"),
    _case("seconds-inf", nothing, "bench in.onnx --seconds inf", 2, "--seconds", "inf"),
    _case("target-unknown", nothing, f"{OPTIMIZE} --target joy", 2, "--target", "joy", "latency"),
    _case("target-unrun", nothing, f"{OPTIMIZE} --target latency --verify none", 2, "--verify"),
    _case("verify-unknown", nothing, f"{OPTIMIZE} --verify maybe", 2, "--verify", "full"),
    _case("include-regex", nothing, f"{OPTIMIZE} --include (", 2, "--include", "expression"),
    _case("exclude-regex", nothing, f"{OPTIMIZE} --exclude [", 2, "--exclude", "expression"),
    _case(
        "include-overflow",
        nothing,
        f"{OPTIMIZE} --include a{{{'9' * 20}}}",
        2,
        "--include",
        "expression",
    ),
    _case("provider-unknown", nothing, f"{OPTIMIZE} --provider tpu", 2, "--provider", "cpu"),
    _case("provider-near", nothing, "bench in.onnx --provider openvno", 2, "openvino is near"),
    _case("provider-twice", nothing, "bench in.onnx --provider cpu,cpu", 2, "cpu twice"),
    _case("provider-option", nothing, "bench in.onnx --provider-option x", 2, "'x'", "KEY=VALUE"),
    _case(
        "provider-option-of-another",
        nothing,
        f"{OPTIMIZE} --provider-option cuda:x=1",
        2,
        "is for cuda",
        "names cpu",
    ),
    _case("provider-library", nothing, f"{OPTIMIZE} --provider-library x", 2, "NAME=PATH"),
    _case(
        "provider-library-absent",
        nothing,
        f"{OPTIMIZE} --provider x --provider-library x=none.so",
        1,
        "no file none.so",
    ),
    _case(
        "provider-library-none",
        nothing,
        f"{OPTIMIZE} --provider x --provider-library x=in.onnx",
        1,
        "in.onnx",
        "library",
    ),
    _case(
        "compare-outputs",
        lambda: save(renamed_output(), "b.onnx"),
        "compare in.onnx b.onnx",
        2,
        "b.onnx",
        "'y'",
    ),
    _case(
        "compare-shapes",
        one_by_one(lambda: save(sequence(1), "a.onnx"), lambda: save(sequence(2), "b.onnx")),
        "compare a.onnx b.onnx",
        2,
        "'y'",
        "[1, 5, 8]",
        "[1, 10, 8]",
    ),
]


PLANS = [
    _case(
        "plan-missing", lambda: Path("plan.json").unlink(), APPLY, 2, "plan.json", "No such file"
    ),
    _case(
        "plan-no-json", text_file("plan.json", "not json"), APPLY, 2, "plan.json", "no onnxlr plan"
    ),
    _case("plan-binary", edited(lambda _: b"\xff\xfe", "plan.json"), APPLY, 2, "plan.json"),
    _case("plan-a-list", text_file("plan.json", "[]"), APPLY, 2, "no onnxlr plan"),
    _case("plan-no-layers", text_file("plan.json", '{"model": "x"}'), APPLY, 2, "layers"),
    _case("plan-deep", text_file("plan.json", "[" * 100_000), APPLY, 2, "no onnxlr plan"),
    _case("plan-seed", text_file("plan.json", '{"model":"x","seed":1e999,"layers":[]}'), APPLY, 2),
    _case("plan-no-seed", changed_plan(lambda p: p.update(seed="x")), APPLY, 2, "no onnxlr plan"),
    _case(
        "plan-other-model",
        lambda: save(weight("w1", sample(32, 32))),
        APPLY,
        2,
        "digest",
        "make a plan for this one",
    ),
    _case("plan-layer-unknown", changed_row(name="fc9"), APPLY, 2, "'fc9'", "no such layer"),
    _case(
        "plan-method-unknown", changed_row(decision="magic"), APPLY, 2, "'magic'", "not installed"
    ),
    _case("plan-method-auto", changed_row(decision="auto"), APPLY, 2, "auto"),
    _case("plan-method-foreign", changed_row(decision="channel-svd"), APPLY, 2, "fc1", "Conv"),
    *(
        _case(f"plan-rank-{rank}", changed_row(rank=rank), APPLY, 2, "plan")
        for rank in (
            [0],
            [-4],
            [10**6],
            [33],
            ["4"],
            [4.5],
            [True],
            [4, 4],
            [],
            None,
            4,
            "4",
            [[4]],
        )
    ),
    _case(
        "plan-twice", changed_plan(lambda p: p["layers"].append(p["layers"][0])), APPLY, 2, "fc1"
    ),
]


CASES = [*MODELS, *DATA, *OUTPUTS, *FLAGS, *PLANS]


_EACH_STAGE = {
    *("truncated", "nan-weight", "data-wrong-shape", "metric-raises", "threads-0", "rank-0"),
    *("made-up-op-unverified", "plan-other-model", "plan-rank-[33]"),
}


WITH_EARLIER_OUTPUT = [case for case in CASES if case.name in _EACH_STAGE]
