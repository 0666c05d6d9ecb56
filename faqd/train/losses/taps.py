"""Taps: the places whose feature maps are compared in teacher and student, and what they are called.

Tokens are a map as well, of the positions that they stand for: `faqd.train.losses.layouts`.
"""

from __future__ import annotations

import difflib

from torch import fx

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.branches import is_probability
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.student import Student
from faqd.train.losses.distillation import AffinityForm
from faqd.train.losses.layouts import Layout, Layouts

ACTIVATIONS = ("rectify", "clamp", "curve")
"""Roles whose results are feature maps behind an activation."""
QUANTIZED = "_quant"
"""What the place of a tensor has at its end where the tensor is rounded."""
WHOLE = "_whole"
"""What the place of a linear layer on tokens has at its end where its rows are tokens again."""
FEW = 8
"""Channels that are too few for a direction: with one, every cosine is 1 or 0."""

Size = tuple[int, int]


def tap_pairs(teacher: fx.GraphModule, student: Student, names: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of node names (teacher, student) whose feature maps are compared.

    names None: those of `_found`, where both networks have one of that size. Otherwise what --feature-layer gives, each
    `LAYER` in both networks or `TEACHER_LAYER=STUDENT_LAYER`.
    """
    if names is None:
        ours, theirs = _found(student.network), _found(teacher)
        return [(theirs[size].name, ours[size].name) for size in theirs if size in ours]
    pairs = []
    for name in names:
        theirs_name, _, ours_name = name.partition("=")
        pairs.append((_map_at(teacher, theirs_name), _map_at(student.network, ours_name or theirs_name)))
    return pairs


def tap_names(teacher: fx.GraphModule, student: Student, pairs: list[tuple[str, str]]) -> list[str]:
    """The pairs as --feature-layer takes them: `TEACHER=STUDENT` where the two are called differently."""
    theirs, ours = (
        {node.name: name.removesuffix(QUANTIZED) for node, name in nodes.places(network).items()}
        for network in (teacher, student.network)
    )
    return [theirs[a] if theirs[a] == ours[b] else f"{theirs[a]}={ours[b]}" for a, b in pairs]


def tap_costs(student: Student, pairs: list[tuple[str, str]], form: AffinityForm, columns: int) -> list[str]:
    """What each pair is and costs: channels, height and width of the student's map, multiplications an image."""
    said = []
    for layout in tap_layouts(student, pairs):
        channels, pixels = layout.channels, layout.height * layout.width
        if form == "fast":
            products = 8 * columns * pixels * channels
        elif form == "l1":
            products = 4 * pixels**2 * channels
        else:
            products = min(2 * pixels, 5 * channels) * pixels * channels
        said.append(f"{layout}, {products / 1e6:.3g} M multiplications an image")
    return said


def tap_layouts(student: Student, pairs: list[tuple[str, str]]) -> list[Layout]:
    """How the student's tensor of each pair is a map."""
    layouts = Layouts(student.network)
    by_name = {node.name: node for node in student.network.graph.nodes}
    found = [layouts.of(by_name[ours]) for _, ours in pairs]
    assert None not in found
    return [layout for layout in found if layout is not None]


def _found(network: fx.GraphModule) -> dict[Size, fx.Node]:
    """Size (H, W) -> the feature map of that size to compare, in graph order.

    In a network with a neck, which is where several layers that make maps of the output read: for each size of such
    maps the last one that all those layers depend on. In any other network the last activated map of each size. Where
    maps are tokens or have their channels last, an activation lies inside of a block and sees what this block adds; the
    stream to which all blocks add, and which all later ones read, is the last sum of that size, and this is taken.
    """
    layouts = Layouts(network)
    maps = {node: layout for node in network.graph.nodes if (layout := _feature_map(network, layouts, node))}
    ends: dict[Size, list[fx.Node]] = {}
    for end in _ends(network):
        layout = layouts.of(end)
        if layout is not None and layout.kind == "map" and layout.size != (1, 1):
            ends.setdefault(layout.size, []).append(end)
    found: dict[Size, fx.Node] = {}
    plain = [node for node, layout in maps.items() if layout.kind == "map"]
    for of_size in ends.values() if any(len(of_size) > 1 for of_size in ends.values()) else ():
        necks = [node for node in plain if not any(_reaches(network, end, node) for end in of_size)]
        if necks:
            found.pop(maps[necks[-1]].size, None)
            found[maps[necks[-1]].size] = necks[-1]
    if not found:
        found, sums = ({maps[n].size: n for n in maps if kind(network, n)} for kind in (_is_activated, _is_sum))
        for size, node in sums.items():
            if maps[found.get(size, node)].kind != "map":
                found[size] = node
    order = list(maps)
    return dict(sorted(found.items(), key=lambda entry: order.index(entry[1])))


def _feature_map(network: fx.GraphModule, layouts: Layouts, node: fx.Node) -> Layout | None:
    """The layout of a map that a layer still reads: of several pixels and channels, and no probability."""
    layout = layouts.of(node)
    if layout is None or node.op == "placeholder":
        return None
    if layout.size == (1, 1) or layout.channels < FEW or is_probability(network, _made_by(network, node)):
        return None
    if layout.kind != "map":
        return layout if layouts.is_read(node) else None
    return layout if any(nodes.role(network, reader) == "compute" for reader in nodes.depending_on(node)) else None


def _made_by(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What is rounded, where `node` rounds."""
    return nodes.operand(node) if isinstance(nodes.module_of(network, node), ActivationQuantizer) else node


def _is_activated(network: fx.GraphModule, node: fx.Node) -> bool:
    module = nodes.module_of(network, node)
    rectifies = isinstance(module, ActivationQuantizer) and module.rectifies
    return rectifies or nodes.role(network, _made_by(network, node)) in ACTIVATIONS


def _is_sum(network: fx.GraphModule, node: fx.Node) -> bool:
    made_by = _made_by(network, node)
    summands = [each for each in nodes.tensor_inputs(made_by) if not nodes.is_own(each)]
    return nodes.role(network, made_by) == "add" and len(summands) > 1


def _ends(network: fx.GraphModule) -> list[fx.Node]:
    """The layers from which an output is reached through no other layer."""
    found: dict[fx.Node, None] = {}
    ahead = [node for node in network.graph.nodes if node.op == "output"]
    seen = set(ahead)
    while ahead:
        for node in ahead.pop().all_input_nodes:
            if nodes.role(network, node) == "compute":
                found[node] = None
            elif node not in seen:
                seen.add(node)
                ahead.append(node)
    return list(found)


def _reaches(network: fx.GraphModule, end: fx.Node, without: fx.Node) -> bool:
    """Whether `end` depends on the network's input on any way around `without`."""
    walk = nodes.reached([end], lambda node: (source for source in node.all_input_nodes if source is not without))
    return any(node.op == "placeholder" for node in walk)


def _map_at(network: fx.GraphModule, place: str) -> str:
    layouts = Layouts(network)
    named = {name: node for node, name in nodes.places(network).items() if nodes.is_tensor(node)}
    for candidate in (place + QUANTIZED, place, place + WHOLE + QUANTIZED, place + WHOLE):
        if candidate in named and layouts.of(named[candidate]) is not None:
            return named[candidate].name
    maps = [name.removesuffix(QUANTIZED) for name, node in named.items() if layouts.of(node) is not None]
    close = ", ".join(difflib.get_close_matches(place, maps, n=3, cutoff=0.0)) or "none"
    if place in named:
        raise UserError(
            f"--feature-layer {place}: its tensor {nodes.shape(named[place])} is neither a feature map (B, C, H, W) or "
            "(B, H, W, C) nor tokens (B, N, C) whose positions are those of a map; the nearest of these are "
            f"{close}."
        )
    raise UserError(f"--feature-layer {place}: no feature map of that name in the network; the nearest are {close}.")
