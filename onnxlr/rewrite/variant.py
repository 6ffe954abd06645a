"""A variant of a model: which layers are replaced, by what, and with which factors."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnxlr.calibrate.statistics import Statistics
from onnxlr.candidates.fitting import output_error, rest_of
from onnxlr.layers.layer import Layer
from onnxlr.methods.choice import Choice, Factored
from onnxlr.methods.cost import weight_error
from onnxlr.widths.narrowing import Narrowing

# Of a variant without its factors: the choices, the samples of sequence, and the narrowing.
Key = tuple[frozenset[tuple[str, Choice]], int, tuple[object, ...] | None]


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
    narrowing : Narrowing or None
        The model with fewer channels whose layers these are; None where they are the original's.
    """

    choices: Mapping[str, Choice]
    factors: Mapping[str, Factored]
    sequential: int = 0
    narrowing: Narrowing | None = None

    @property
    def changes_anything(self) -> bool:
        """Whether its model is another than the original."""
        return bool(self.choices) or self.narrowing is not None

    @property
    def key(self) -> Key:
        """What tells it from others, without its factors."""
        narrowing = None if self.narrowing is None else self.narrowing.key
        return frozenset(self.choices.items()), self.sequential, narrowing

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
