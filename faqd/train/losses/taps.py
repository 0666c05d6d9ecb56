"""Taps: the places whose feature maps are compared in teacher and student, and what they are called."""

from __future__ import annotations

import difflib

from torch import fx

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.student import Student
from faqd.train.losses.distillation import AffinityForm
from faqd.train.losses.heads import is_probability

ACTIVATIONS = ("rectify", "clamp", "curve")
"""Roles whose results are feature maps behind an activation."""
QUANTIZED = "_quant"
"""What the place of a tensor has at its end where the tensor is rounded."""
FEW = 8
"""Channels that are too few for a direction: with one, every cosine is 1 or 0."""

Size = tuple[int, int]


def tap_pairs(teacher: fx.GraphModule, student: Student, names: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of node names (teacher, student) whose feature maps are compared.

    names None: those of `_found`, where both networks have one of that size. Otherwise what --tap gives, each `PLACE`
    in both networks or `TEACHER_PLACE=STUDENT_PLACE`.
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
    """The pairs as --tap takes them: places of the teacher and of the student, `TEACHER=STUDENT` where they differ."""
    theirs, ours = (
        {node.name: name.removesuffix(QUANTIZED) for node, name in nodes.places(network).items()}
        for network in (teacher, student.network)
    )
    return [theirs[a] if theirs[a] == ours[b] else f"{theirs[a]}={ours[b]}" for a, b in pairs]


def tap_costs(student: Student, pairs: list[tuple[str, str]], form: AffinityForm, columns: int) -> list[str]:
    """What each pair is and costs: channels, height and width of the student's map, multiplications an image."""
    shapes = {node.name: nodes.shape(node) for node in student.network.graph.nodes if nodes.is_tensor(node)}
    said = []
    for _, ours in pairs:
        _, channels, height, width = shapes[ours]
        pixels = height * width
        if form == "fast":
            products = 8 * columns * pixels * channels
        elif form == "l1":
            products = 4 * pixels**2 * channels
        else:
            products = min(2 * pixels, 5 * channels) * pixels * channels
        said.append(f"{channels} x {height} x {width}, {products / 1e6:.3g} M multiplications an image")
    return said


def _found(network: fx.GraphModule) -> dict[Size, fx.Node]:
    """Size (H, W) -> the feature map of that size to compare, in graph order.

    In a network with a neck, which is where several layers that make maps of the output read: for each size of such
    maps the last one that all those layers depend on. In any other network the last activated map of each size.
    """
    maps = [node for node in network.graph.nodes if _is_feature_map(network, node)]
    ends: dict[Size, list[fx.Node]] = {}
    for end in _ends(network):
        if nodes.is_tensor(end) and len(nodes.shape(end)) == 4 and _size(end) != (1, 1):
            ends.setdefault(_size(end), []).append(end)
    found: dict[Size, fx.Node] = {}
    for of_size in ends.values() if any(len(of_size) > 1 for of_size in ends.values()) else ():
        necks = [node for node in maps if not any(_reaches(network, end, node) for end in of_size)]
        if necks:
            found.pop(_size(necks[-1]), None)
            found[_size(necks[-1])] = necks[-1]
    if found:
        return dict(sorted(found.items(), key=lambda entry: maps.index(entry[1])))
    for node in filter(lambda node: _is_activated(network, node), maps):
        found.pop(_size(node), None)
        found[_size(node)] = node
    return found


def _is_feature_map(network: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a map that a layer still reads: of several pixels and channels, and no probability."""
    if not nodes.is_tensor(node) or len(nodes.shape(node)) != 4 or node.op == "placeholder":
        return False
    made_by = nodes.operand(node) if isinstance(nodes.module_of(network, node), ActivationQuantizer) else node
    if _size(node) == (1, 1) or nodes.shape(node)[1] < FEW or is_probability(network, made_by):
        return False
    return any(nodes.role(network, reader) == "compute" for reader in nodes.depending_on(node))


def _is_activated(network: fx.GraphModule, node: fx.Node) -> bool:
    module = nodes.module_of(network, node)
    if isinstance(module, ActivationQuantizer):
        return module.rectifies or nodes.role(network, nodes.operand(node)) in ACTIVATIONS
    return nodes.role(network, node) in ACTIVATIONS


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


def _size(node: fx.Node) -> Size:
    height, width = nodes.shape(node)[2:]
    return height, width


def _map_at(network: fx.GraphModule, place: str) -> str:
    maps = {
        name: node.name
        for node, name in nodes.places(network).items()
        if nodes.is_tensor(node) and len(nodes.shape(node)) == 4
    }
    for candidate in (place + QUANTIZED, place):
        if candidate in maps:
            return maps[candidate]
    close = difflib.get_close_matches(place, [name.removesuffix(QUANTIZED) for name in maps], n=3, cutoff=0.0)
    raise UserError(f"--tap {place}: no feature map of that name in the network; the nearest are {', '.join(close)}.")
