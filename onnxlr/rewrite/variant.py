"""A variant of a model: which layers are replaced, by what, and with which factors."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import output_error, rest_of
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import weight_error


@dataclass(frozen=True)
class Variant:
    """A set of choices with the factors that carry them out.

    Attributes
    ----------
    choices : mapping of str to Choice
        By layer name.
    factors : mapping of str to Factored
        What is stored for each of those layers.
    sequential : int
        How many samples the factors were corrected on in sequence; 0 where each layer was fitted by
        itself.
    """

    choices: Mapping[str, Choice]
    factors: Mapping[str, Factored]
    sequential: int = 0

    def weight_error(self, layer: Layer) -> float:
        """Relative error of a layer's weight by its factors as they are stored."""
        choice = self.choices[layer.name]
        factors = self.factors[layer.name].factors
        return weight_error(layer, choice.graph_pass, choice.rank, factors)

    def output_error(self, layer: Layer, statistics: Statistics | None) -> float | None:
        """Relative error of a layer's output on the calibration data.

        It is None where the layer's inputs weren't looked at, and where its users run on the whole
        weight.
        """
        choice = self.choices[layer.name]
        if statistics is None or choice.graph_pass.at_load:
            return None
        factors = self.factors[layer.name].factors
        return output_error(
            layer, rest_of(choice.graph_pass, layer, choice.rank, factors), statistics
        )
