"""Float islands: the parts of a network that have no integer form, and what stays float beside them.

What reads an island's result is float up to the next layer: a sum, a product or an average of floats is computed in
float by every backend, and rounding its operands would only lose; a concatenation of floats needs no scale for all of
them, at which a class token would be nothing beside a map. So is a sum that nothing but islands read, as the residual
stream of a transformer, which its norms read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from faqd.quantize import nodes
from faqd.quantize.capture.aten import word_of

_JOINING = ("add", "multiply", "average", "concat")
"""Operators that round what they read, or let it share a scale, unless it is float anyway."""
_PASSING = ("reshape", "rectify", "clamp", "curve", "norm")
"""Operators on whose account nothing is rounded."""


def with_shores(traced: fx.GraphModule, floats: set[fx.Node]) -> set[fx.Node]:
    """The nodes that have no integer form (shapes propagated), and those that stay float beside them."""
    if not floats:
        return floats
    found = set(floats)
    reached: set[fx.Node] = set()
    for node in traced.graph.nodes:
        kind = nodes.role(traced, node)
        behind = not reached.isdisjoint(nodes.tensor_inputs(node))
        if node not in found and behind and kind in _JOINING:
            found.add(node)
        if (node in found or (behind and kind in _PASSING)) and nodes.is_tensor(node):
            reached.add(node)
    for node in reversed(traced.graph.nodes):
        if nodes.role(traced, node) in _JOINING and set(readers(traced, node, found)) == {True}:
            found.add(node)
    return found


def readers(traced: fx.GraphModule, node: fx.Node, floats: set[fx.Node]) -> Iterator[bool]:
    """Whether each operator that reads the result of a node is float, behind those that pass values on; nothing for an
    output of the network."""
    for reader in nodes.reached(node.users, lambda n: n.users if _passes(traced, n, floats) else ()):
        if not (reader.op == "output" or _passes(traced, reader, floats)):
            yield reader in floats


def reads_floats(traced: fx.GraphModule, reader: fx.Node, floats: set[fx.Node]) -> bool:
    """Whether nothing but islands, and outputs of the network, read what a reader of an island's result passes on."""
    if reader in floats or reader.op == "output":
        return True
    return nodes.role(traced, reader) in _PASSING and all(readers(traced, reader, floats))


@dataclass(frozen=True)
class Island:
    """Operators without an integer form that read each other. operators: what each is called, by place. line: of the
    user's code, where the first stands, as ` (vit.py:12)`."""

    operators: dict[str, str]
    line: str


def islands_of(traced: fx.GraphModule, floats: set[fx.Node]) -> list[Island]:
    """In graph order; islands that touch are one."""
    places = nodes.places(traced)
    group: dict[fx.Node, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node not in floats:
            continue
        joined = {id(group[near]): group[near] for near in _near(traced, node, floats) if near in group}
        members = [member for part in joined.values() for member in part] + [node]
        group |= dict.fromkeys(members, members)
    unique = {id(members): members for members in group.values()}
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    sorted_members = (sorted(members, key=order.__getitem__) for members in unique.values())
    return [
        Island({places[n]: _called(traced, n) for n in members}, _without_folders(nodes.line_of_code(members[0])))
        for members in sorted(sorted_members, key=lambda members: order[members[0]])
    ]


def _near(traced: fx.GraphModule, node: fx.Node, floats: set[fx.Node]) -> Iterator[fx.Node]:
    """The island's nodes that a node reads, behind those that pass values on."""
    walk = nodes.reached(node.all_input_nodes, lambda n: n.all_input_nodes if _passes(traced, n, floats) else ())
    return (read for read in walk if read in floats)


def _passes(traced: fx.GraphModule, node: fx.Node, floats: set[fx.Node]) -> bool:
    return node not in floats and nodes.role(traced, node) in _PASSING


def _without_folders(line: str) -> str:
    return f" ({Path(line[2:-1]).name})" if line else ""


def _called(traced: fx.GraphModule, node: fx.Node) -> str:
    module: Any = nodes.module_of(traced, node)
    return type(module).__name__ if module is not None else word_of(node)
