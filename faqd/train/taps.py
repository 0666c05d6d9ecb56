"""Taps: the places whose feature maps are compared in teacher and student, and what they are called."""

from __future__ import annotations

import difflib

from torch import fx

from faqd.errors import UserError
from faqd.train import graph
from faqd.train.prepare import Student
from faqd.train.quantizers import ActivationQuantizer

ACTIVATIONS = ("rectify", "clamp", "curve")
"""Roles whose results are feature maps behind an activation."""
QUANTIZED = "_quant"
"""What the place of a tensor has at its end where the tensor is rounded."""


def tap_pairs(teacher: fx.GraphModule, student: Student, names: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of node names (teacher, student) whose feature maps are compared.

    names None: the last activated map of each size, where both networks have one of that size. Otherwise what --tap
    gives, each `PLACE` in both networks or `TEACHER_PLACE=STUDENT_PLACE`.
    """
    if names is None:
        ours, theirs = _last_maps(student.network), _last_maps(teacher)
        return [(theirs[size], ours[size]) for size in theirs if size in ours]
    pairs = []
    for name in names:
        theirs_name, _, ours_name = name.partition("=")
        pairs.append((_map_at(teacher, theirs_name), _map_at(student.network, ours_name or theirs_name)))
    return pairs


def tap_names(teacher: fx.GraphModule, student: Student, pairs: list[tuple[str, str]]) -> list[str]:
    """The pairs as --tap takes them: places of the teacher and of the student, `TEACHER=STUDENT` where they differ."""
    theirs, ours = (
        {node.name: name.removesuffix(QUANTIZED) for node, name in graph.places(network).items()}
        for network in (teacher, student.network)
    )
    return [theirs[a] if theirs[a] == ours[b] else f"{theirs[a]}={ours[b]}" for a, b in pairs]


def _last_maps(network: fx.GraphModule) -> dict[tuple[int, int], str]:
    """Size (H, W) -> name of the last activated feature map of that size, in graph order; one pixel is no map."""
    found: dict[tuple[int, int], str] = {}
    for node in network.graph.nodes:
        if not graph.is_tensor(node) or len(graph.shape(node)) != 4:
            continue
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        activated = graph.role(network, node) in ACTIVATIONS
        if isinstance(module, ActivationQuantizer):
            activated = not module.quant.signed or graph.role(network, graph.operand(node)) in ACTIVATIONS
        size = graph.shape(node)[2:]
        if activated and size != (1, 1):
            found.pop((size[0], size[1]), None)
            found[size[0], size[1]] = node.name
    return found


def _map_at(network: fx.GraphModule, place: str) -> str:
    maps = {
        name: node.name
        for node, name in graph.places(network).items()
        if graph.is_tensor(node) and len(graph.shape(node)) == 4
    }
    for candidate in (place + QUANTIZED, place):
        if candidate in maps:
            return maps[candidate]
    close = difflib.get_close_matches(place, [name.removesuffix(QUANTIZED) for name in maps], n=3, cutoff=0.0)
    raise UserError(f"--tap {place}: no feature map of that name in the network; the nearest are {', '.join(close)}.")
