"""Sizes that depend on each other: symbols of open axes, and expressions such as ``past + 1``."""

import ast
import operator
from collections.abc import Callable, Iterable, Mapping

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., int]] = {
    "max": max,
    "min": min,
    "floor": int,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
_LONGEST = 200  # characters of an expression


class Sizes:
    """The sizes of a model's open axes, by what stands there: a symbol, or an expression of some.

    Exporters write both as text. A text is an expression where a symbol in it stands alone at
    another axis; ``total_…`` is the sum of ``past_…`` and the rest, as decoders' runtimes have it.

    Parameters
    ----------
    texts : iterable of str
        What stands at the open axes of all inputs.

    Examples
    --------
    >>> sizes = Sizes(["past", "past + 1"])
    >>> sizes.set("past", 7)
    >>> sizes.get("past + 1")
    8
    """

    def __init__(self, texts: Iterable[str]) -> None:
        parsed = {text: _parse(text) for text in texts}
        alone = {text for text, tree in parsed.items() if tree is None or _is_name(tree)}
        self._expressions: dict[str, ast.expr] = {}
        for text, tree in parsed.items():
            if tree is not None and text not in alone and alone & set(names_in(tree)):
                self._expressions[text] = tree
            elif (total := _total(text, alone)) is not None:
                self._expressions[text] = total
        self._known: dict[str, int] = {}

    @property
    def symbols(self) -> list[str]:
        """The symbols of all expressions, each once."""
        names = (name for tree in self._expressions.values() for name in names_in(tree))
        return list(dict.fromkeys(names))

    def is_expression(self, text: str) -> bool:
        """Whether a text is made of symbols, and so has no size of its own."""
        return text in self._expressions

    def set(self, symbol: str, size: int) -> None:
        """Give a symbol a size, or an expression one that counts in place of what it says."""
        self._known[symbol] = size

    def get(self, text: str) -> int | None:
        """The size that was given, or that follows from others; None if neither is known."""
        if text in self._known:
            return self._known[text]
        tree = self._expressions.get(text)
        try:
            size = None if tree is None else _value(tree, self._known)
        except (KeyError, ValueError, ZeroDivisionError, TypeError):
            return None
        return size if size is not None and size >= 0 else None


def _parse(text: str) -> ast.expr | None:
    try:
        return ast.parse(text.strip(), mode="eval").body if len(text) <= _LONGEST else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_name(tree: ast.expr) -> bool:
    return _name(tree) is not None


def _name(tree: ast.expr) -> str | None:
    """A symbol, which may have dots in it."""
    if isinstance(tree, ast.Attribute):
        front = _name(tree.value)
        return None if front is None else f"{front}.{tree.attr}"
    return tree.id if isinstance(tree, ast.Name) else None


def names_in(tree: ast.expr) -> list[str]:
    """The symbols in an expression."""
    if (name := _name(tree)) is not None:
        return [name]
    inner = tree.args if isinstance(tree, ast.Call) else ast.iter_child_nodes(tree)
    return [n for child in inner if isinstance(child, ast.expr) for n in names_in(child)]


def _value(tree: ast.expr, known: Mapping[str, int]) -> int:
    """An expression's value; ``KeyError`` or ``ValueError`` if it has none."""
    if (name := _name(tree)) is not None:
        return known[name]
    match tree:
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, known), _value(right, known))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known)
        case ast.Call(func=ast.Name(id=function), args=args) if function.lower() in _CALLS:
            return _CALLS[function.lower()](*(_value(a, known) for a in args))
    raise ValueError(ast.dump(tree))


def _total(text: str, symbols: set[str]) -> ast.expr | None:
    """``total_length`` as ``past_length + length``, or plus one where that isn't open."""
    past, own = text.replace("total", "past"), text.replace("total_", "")
    if past == text or past not in symbols:
        return None
    return _parse(f"{past} + {own if own in symbols else 1}")
