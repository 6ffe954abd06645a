"""The pass in Olive: a workflow as people run it, its parameters, and samples of Olive's own."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxlr
from onnxlr.errors import ModelError, OnnxlrError, UsageError
from onnxlr.olive.package import installed_config, with_our_pass
from tests.support.builders import linear, low_rank

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Olive imports has much to say
    pytest.importorskip("olive.passes", reason="the extra olive isn't installed")
    from olive.data.config import DataConfig
    from olive.data.registry import Registry
    from olive.hardware import AcceleratorSpec
    from olive.model import HfModelHandler, ONNXModelHandler
    from pydantic import ValidationError

    from onnxlr.olive.optimize_pass import Onnxlr

pytestmark = pytest.mark.filterwarnings("ignore")  # Olive's

MLP = Path(__file__).parents[2] / "models" / "fashion-mlp.onnx"
CPU = AcceleratorSpec("cpu", "CPUExecutionProvider")
QUICK = {"target": "params", "rank": "0.25", "max_drop": 1}


def make_pass(accelerator: Any = CPU, **config: Any) -> Any:
    return Onnxlr(accelerator, Onnxlr.generate_config(accelerator, config, disable_search=True))


@pytest.fixture
def net(here: Path) -> Any:
    """A model whose weight has rank 6, as Olive hands it over."""
    onnx.save(linear(low_rank(np.random.default_rng(0), 64, 48, 6), rows="n"), here / "net.onnx")
    return ONNXModelHandler(str(here / "net.onnx"))


def samples(count: int = 120) -> dict[str, Any]:
    """Inputs, and the classes that the model finds."""
    x = np.random.default_rng(1).standard_normal((count, 64)).astype(np.float32)
    scores = onnxruntime.InferenceSession("net.onnx").run(None, {"x": x})[0]
    return {"x": x, "label": scores.argmax(axis=1)}


def test_olive_run_on_the_shipped_model_with_quantization_behind(
    here: Path, few_images: Path
) -> None:
    config = with_our_pass(installed_config())
    (here / "olive_config.json").write_text(json.dumps(config))
    ours = {"type": "Onnxlr", "data": few_images.name, "labels": "label", **QUICK}
    ours |= {"method": "svd", "exclude": "head", "json_out": "report.json"}
    workflow = {
        "input_model": {"type": "OnnxModel", "model_path": str(MLP)},
        "passes": {"low_rank": ours, "int8": {"type": "OnnxDynamicQuantization"}},
        "output_dir": "out",
    }
    (here / few_images.name).write_bytes(few_images.read_bytes())
    (here / "run.json").write_text(json.dumps(workflow))
    words = ("run", "--config", "run.json", "--package-config", "olive_config.json")
    done = subprocess.run(
        [sys.executable, "-m", "olive", *words],
        env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((here / "report.json").read_text())
    replaced = [row for row in report["layers"] if row["decision"] == "svd"]
    assert len(replaced) == 5
    assert report["verdict"] in done.stdout + done.stderr  # in Olive's own log

    out = here / "out" / "model.onnx"
    nodes = Counter(n.op_type for n in onnx.load(out).graph.node)
    assert nodes["MatMulInteger"] == 11  # two for each layer that was replaced
    # A quarter of the weights in a fourth of the bytes.
    assert out.stat().st_size < 0.3 * report["output"]["bytes"] < 0.3 * MLP.stat().st_size
    with np.load(few_images) as arrays:
        image, label = arrays["image"], arrays["label"]
    for path, least in ((MLP, 0.85), (out, 0.8)):
        session = onnxruntime.InferenceSession(path)
        (name,) = [i.name for i in session.get_inputs()]
        scores = np.asarray(session.run(None, {name: image})[0])
        assert (scores.argmax(axis=1) == label).mean() > least


def test_every_argument_is_a_parameter_with_its_words() -> None:
    params = Onnxlr.default_config(CPU)
    arguments = signature(onnxlr.optimize).parameters
    assert set(arguments) - {"model", "out", "progress"} <= {*params, "json"}
    assert all(p.description for p in params.values())
    assert params["max_drop"].description.startswith("Largest loss of the metric")
    assert params["validation"].description == params["data"].description
    for name in ("max_drop", "rank", "threads", "verify", "seed", "without"):
        assert params[name].default_value == arguments[name].default
    assert params["max_drop"].type_ is float
    assert params["rank"].type_ == str | int
    assert params["method"].type_ == str | list[str]
    assert {n for n, p in params.items() if p.category == "path"} >= {"data", "report", "json_out"}
    assert "save_as_external_data" in params
    assert not Onnxlr.is_accelerator_agnostic(CPU)


def test_values_are_checked_by_olive_before_anything_runs() -> None:
    config = make_pass(rank=8, method=["svd", "cp"], max_drop=1, report="r.html").config
    assert (config.rank, config.method, config.max_drop) == (8, ["svd", "cp"], 1.0)
    assert Path(config.report).is_absolute()
    for wrong in ({"max_drop": "little"}, {"threads": "two"}, {"method": 3}, {"measure": "ja"}):
        with pytest.raises(ValidationError):
            make_pass(**wrong)


def test_the_provider_is_that_of_the_accelerator() -> None:
    cuda = AcceleratorSpec("gpu", "CUDAExecutionProvider")
    assert make_pass().config.provider == "cpu"
    assert make_pass(cuda).config.provider == "cuda"
    assert make_pass(cuda, provider="cpu").config.provider == "cpu"
    assert make_pass(AcceleratorSpec("cpu")).config.provider == "cpu"


@pytest.mark.parametrize("labels", [None, "label"])
@pytest.mark.parametrize("named", [False, True])
def test_data_sets_of_olive_do_as_files_do(net: Any, labels: str | None, named: bool) -> None:
    arrays = samples()

    @Registry.register_dataset("onnxlr_test_data")  # type: ignore[untyped-decorator]
    def rows(**_: Any) -> Any:
        pairs = zip(arrays["x"], arrays["label"], strict=True)
        return [({"x": x} if named else x, int(label)) for x, label in pairs]

    config = DataConfig(
        name="d",
        load_dataset_config={"type": "onnxlr_test_data"},
        pre_process_data_config={"type": "skip_pre_process"},
        dataloader_config={"batch_size": 7},
    )
    np.savez("s.npz", **arrays)
    given = {"target": "params", "labels": labels}
    made = [
        make_pass(data_config=config, json_out="a.json", **given).run(net, "a"),
        make_pass(data="s.npz", json_out="b.json", **given).run(net, "b"),
    ]
    reports = [json.loads(Path(name).read_text()) for name in ("a.json", "b.json")]
    assert reports[0]["metric"] == reports[1]["metric"]
    assert reports[0]["metric"]["name"] == ("top1" if labels else "agreement")
    assert [row["rank"] for row in reports[0]["layers"]] == [6]
    models = [onnx.load(handler.model_path) for handler in made]
    assert models[0].graph == models[1].graph


def test_external_data_stands_beside_the_model(net: Any) -> None:
    options = {"save_as_external_data": True, "size_threshold": 0, "external_data_name": "w.bin"}
    out = make_pass(**QUICK, **options).run(net, "out")
    folder = Path(out.model_path).parent
    assert sorted(path.name for path in folder.iterdir()) == ["net.onnx", "w.bin"]
    assert len(onnx.load(out.model_path, load_external_data=False).graph.node) == 2
    x = samples(4)["x"]
    session = onnxruntime.InferenceSession(out.model_path)
    assert np.isfinite(np.asarray(session.run(None, {"x": x})[0])).all()


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"data": "s.npz", "data_config": {"name": "d"}}, UsageError, "both given"),
        ({"rank": "much"}, UsageError, "rank"),
        ({"target": "params=0.0001", "max_drop": 0}, OnnxlrError, "params"),
    ],
)
def test_what_makes_no_sense_ends_the_workflow_with_one_line(
    net: Any, config: dict[str, Any], kind: type[OnnxlrError], words: str
) -> None:
    with pytest.raises(kind, match=words) as caught:
        make_pass(**config).run(net, "out")
    assert "\n" not in str(caught.value)


def test_other_models_are_refused() -> None:
    other = HfModelHandler.__new__(HfModelHandler)
    with pytest.raises(ModelError, match=r"not a HfModelHandler: .* OnnxConversion"):
        make_pass()._run_for_config(other, make_pass().config, "out")
