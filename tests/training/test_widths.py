"""Training keeps every channel, and says so."""

import pytest

torch = pytest.importorskip("torch")

import onnxlr  # noqa: E402
from onnxlr.plan.plan import Plan  # noqa: E402
from onnxlr.plan.width_plan import WidthDecision, WidthPlan  # noqa: E402
from onnxlr.training import DeepTwist, factorize_  # noqa: E402


def test_modules_keep_their_channels() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    with pytest.raises(onnxlr.UsageError, match="optimize the exported model"):
        DeepTwist(model, method="interpolative")
    row = WidthDecision("0", 6, "interpolative", (0, 2), "", ("0",), ("2",), ())
    with pytest.raises(onnxlr.UsageError, match="narrows widths"):
        factorize_(model, Plan("digest", (), widths=WidthPlan((row,))))
