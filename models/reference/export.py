"""Exports a trained network to one self-contained ONNX file and checks it in ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from models.reference.checkpoint import load_network
from models.reference.datasets import DATASETS, load, pixels
from models.reference.files import replace_file

# Largest difference of a logit, relative to the largest logit. Float32 kernels that sum in
# another order differ by about 1e-6; a wrong layout, weight or constant by far more than 1e-5.
TOLERANCE = 1e-5
CHECK_IMAGES = 64
# The exporter of torch 2.13 calls what torch 2.13 has deprecated.
_EXPORTER_WARNING = r"`isinstance\(treespec, LeafSpec\)` is deprecated"


class ExportError(click.ClickException):
    """The exported model doesn't compute what the PyTorch network computes."""


def export_onnx(network: nn.Module, image: Tensor, path: Path, *, output: str = "logits") -> float:
    """Write `network` to `path` in eval mode; return the largest relative difference.

    The file has one input "image" of shape (batch, channels, side, side) and one output of shape
    (batch, n), by default called "logits", and holds all its weights. It appears only once it has
    passed the checks: onnx.checker, and ONNX Runtime against PyTorch on `image`, a Tensor of shape
    (n, channels, side, side), run one by one and all at once.

    Raises ExportError when a relative difference is over TOLERANCE.
    """
    network.eval()
    with _quiet():
        program = torch.onnx.export(
            network,
            # Two images, because torch.export treats a dimension of 1 as fixed.
            (image[:1].repeat(2, 1, 1, 1),),
            dynamo=True,
            input_names=["image"],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program; use torch 2.6 or newer.")
    model = program.model_proto
    strip_notes(model)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    difference = _largest_difference(network, content, image)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{path} not written: ONNX Runtime's {output} differ from PyTorch's by "
            f"{difference:.1e} of the largest, more than {TOLERANCE:.0e}; the exporter of torch "
            f"{torch.__version__} mistranslates this network, try another version."
        )
    replace_file(path, content)
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter says of itself, which is nothing that a user could act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _EXPORTER_WARNING, FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def strip_notes(model: onnx.ModelProto) -> None:
    """Clear the doc_string and metadata_props of a model and of all that its graph holds.

    The exporter notes the Python stack trace of every node there. The trace holds paths of the
    machine that ran the export, which are of no use to others and make files differ.
    """
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    for part in (model, graph, *graph.node, *graph.initializer, *values):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _largest_difference(network: nn.Module, content: bytes, image: Tensor) -> float:
    """Return the largest relative difference between ONNX Runtime and PyTorch on `image`."""
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = []
    for size in (1, len(image)):
        for batch in torch.split(image, size):
            with torch.no_grad():
                expected = network(batch).numpy()  # (size, n)
            (outputs,) = session.run(None, {"image": batch.numpy()})  # (size, n)
            differences.append(np.abs(outputs - expected).max() / np.abs(expected).max())
    # numpy's max, unlike Python's, passes on a NaN, which the caller's check then refuses.
    return float(np.max(differences))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder of the data set, to check on its test images; on random pixels otherwise.",
)
def main(checkpoint: Path, out: Path, data_dir: Path | None) -> None:
    """Write the network of a CHECKPOINT, as models.reference.train leaves it, to the ONNX file OUT.

    \b
    Example:
      python -m models.reference.export fashion-mlp-384.pt models/fashion-mlp.onnx
    """
    recipe, network = load_network(checkpoint)
    spec = DATASETS[recipe.data]
    if data_dir is None:
        shape = (CHECK_IMAGES, spec.channels, spec.side, spec.side)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    else:
        image = pixels(load(recipe.data, data_dir)[1].image[:CHECK_IMAGES])
    difference = export_onnx(network, image, out)
    click.echo(
        f"{out}: {out.stat().st_size:,} bytes; "
        f"logits within {difference:.1e} of PyTorch's in ONNX Runtime"
    )


if __name__ == "__main__":
    main()
