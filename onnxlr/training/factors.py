"""Modules of PyTorch around factors that train: convolutions, products and tables."""

from collections.abc import Mapping

from torch import nn

from onnxlr.methods.writer import AttributeValue

Dims = tuple[int, ...]


def convolution(
    op_type: str,
    attributes: Mapping[str, AttributeValue],
    weight: nn.Parameter,
    bias: nn.Parameter | None = None,
) -> nn.Module:
    """A convolution around a kernel, with the attributes of its node."""

    def numbers(name: str, default: int) -> Dims:
        values = attributes.get(name, (default,) * count)
        assert isinstance(values, tuple)
        return values

    kernel = attributes["kernel_shape"]
    assert isinstance(kernel, tuple)
    count, group = len(kernel), attributes.get("group", 1)
    assert isinstance(group, int)
    pads = numbers("pads", 0) if "pads" in attributes else (0,) * (2 * count)
    before, after = pads[:count], pads[count:]
    options = {
        "stride": numbers("strides", 1),
        # Uneven pads come of padding="same" alone.
        "padding": before if before == after else "same",
        "dilation": numbers("dilations", 1),
        "groups": group,
        "bias": bias is not None,
        "device": "meta",
    }
    outputs, inputs = weight.shape[0], weight.shape[1] * group
    if op_type == "ConvTranspose":
        outputs, inputs = weight.shape[1] * group, weight.shape[0]
        options["output_padding"] = numbers("output_padding", 0)
    module: nn.Module = getattr(nn, f"{op_type}{count}d")(inputs, outputs, kernel, **options)
    module.weight, module.bias = weight, bias
    return module


def embedding(weight: nn.Parameter, origin: nn.Module) -> nn.Module:
    """A table that is looked up as the original was; its row of padding stays zero if it was."""
    padding = origin.padding_idx
    module = nn.Embedding(
        *weight.shape,
        padding_idx=padding,
        scale_grad_by_freq=origin.scale_grad_by_freq,
        sparse=origin.sparse,
        device="meta",
    )
    module.weight = weight
    if padding is not None and not bool(origin.weight[padding].any()):
        weight.data[padding] = 0
    return module


def linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Module:
    """A product with a matrix that is stored as (outputs, inputs)."""
    outputs, inputs = weight.shape
    module = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    module.weight, module.bias = weight, bias
    return module
