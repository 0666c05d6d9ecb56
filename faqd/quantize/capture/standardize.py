"""What several nodes of a captured network are together, as one module.

x * torch.sigmoid(x) becomes SiLU, a frozen batch norm that is written out becomes one, and what an operator reads of
the network's own becomes its numbers. Nodes keep their names, their places and their lines in the user's code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from faqd.quantize import nodes
from faqd.quantize.capture.lift_parameters import join_constants, norm_of_constants, with_own_tensors
from faqd.quantize.capture.settle_sizes import crop, with_whole_windows
from faqd.quantize.capture.written_out import is_near, written_out
from faqd.quantize.operators.arithmetic import Scaled
from faqd.quantize.operators.clamp import Clamp
from faqd.quantize.operators.shape import Reshape


def standardise(traced: fx.GraphModule) -> None:
    """Rewrite `traced` (shapes propagated) in place; what has no standard term stays as it is."""
    # What has weights keeps them together until it is deployed.
    nodes.unshare(traced, lambda module: not module.state_dict())
    names = nodes.places(traced)
    for node in list(traced.graph.nodes):
        if not nodes.is_tensor(node) or not node.op.startswith("call"):
            continue
        if _is_broadcast(traced, node):
            node.replace_all_uses_with(nodes.operand(node))
            continue
        module = with_own_tensors(traced, node) or with_whole_windows(traced, node)
        if module is not None:
            _call(traced, node, names[node], module)
        crop(traced, node, names[node])
        join_constants(traced, node, names[node])
        if isinstance(nodes.module_of(traced, node), nn.Linear) and len(nodes.shape(node)) > 2:
            _on_rows(traced, node, names[node])
    for node in traced.graph.nodes:
        if nodes.is_tensor(node) and (found := written_out(traced, node)) is not None:
            node.args, node.kwargs = found[:1], {}
            _call(traced, node, nodes.places(traced)[node], found[1])
        for join in (_hard_sigmoid, _gated, _divided_gate, _frozen_norm):
            join(traced, node)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()


def _call(traced: fx.GraphModule, node: fx.Node, place: str, module: nn.Module) -> None:
    """Let `node` call `module` on its tensor, at `place`."""
    source = nodes.operand(node)
    if str(node.target) == place:
        traced.set_submodule(place, module)
    else:  # a function, or a second use of a module, which may mean another size there
        while place in {name for name, _ in traced.named_modules()}:
            place += "_"
        traced.add_submodule(place, module)
    node.op, node.target, node.args, node.kwargs = "call_module", place, (source,), {}
    node.meta["nn_module_stack"] = (node.meta.get("nn_module_stack") or {}) | {place: (place, type(module))}


def _is_broadcast(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a map is brought to the size of another that it then meets, which the sum or product does by itself."""
    if node.target not in _EXPANDS or nodes.is_own(node):
        return False
    before, after = nodes.shape(nodes.operand(node)), nodes.shape(node)
    if len(before) != len(after) or any(a not in (1, b) for a, b in zip(before, after, strict=True)):
        return False

    def has_another_of_that_size(reader: fx.Node) -> bool:
        others = [each for each in _tensors(reader) if each is not node]
        return nodes.role(traced, reader) in ("add", "multiply") and any(nodes.shape(each) == after for each in others)

    return bool(node.users) and all(map(has_another_of_that_size, node.users))


_EXPANDS = (Tensor.expand, Tensor.expand_as, Tensor.repeat)


def _on_rows(traced: fx.GraphModule, node: fx.Node, place: str) -> None:
    """A linear layer on vectors, whatever axes they stand in: one axis before it, all of them behind."""
    before = nodes.operand(node)
    for name, sizes in (("rows", nodes.shape(before)[-1:]), ("whole", nodes.shape(node)[1:])):
        traced.add_submodule(f"{place}_{name}", Reshape((-1, *sizes)))
    with traced.graph.inserting_before(node):
        rows = traced.graph.call_module(f"{place}_rows", (before,))
    with traced.graph.inserting_after(node):
        whole = traced.graph.call_module(f"{place}_whole", (node,))
    for new, like in ((rows, before), (whole, node)):
        new.meta, new.stack_trace = {"tensor_meta": like.meta["tensor_meta"]}, node.stack_trace
    node.args, node.kwargs = (rows,), {}
    nodes.read_instead(node, whole)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if nodes.is_tensor(argument)]


# Activations written out -----------------------------------------------------------------------------------------


def _is_scaled(module: nn.Module | None, factor: float, offset: float) -> bool:
    if not isinstance(module, Scaled) or not isinstance(module.factor, float) or not isinstance(module.offset, float):
        return False
    return is_near(module.factor, factor) and module.offset == offset


def _is_relu6_of_x_plus_3(traced: fx.GraphModule, node: Any) -> bool:
    clamp = nodes.module_of(traced, node)
    return (
        isinstance(clamp, Clamp)
        and (clamp.low, clamp.high) == (0.0, 6.0)
        and _is_scaled(nodes.module_of(traced, nodes.operand(node)), 1.0, 3.0)
    )


def _hard_sigmoid(traced: fx.GraphModule, node: fx.Node) -> None:
    """relu6(x + 3) / 6"""
    if _is_scaled(nodes.module_of(traced, node), 1 / 6, 0.0) and _is_relu6_of_x_plus_3(traced, nodes.operand(node)):
        traced.set_submodule(str(node.target), nn.Hardsigmoid())
        node.args = (nodes.operand(nodes.operand(nodes.operand(node))),)


def _gated(traced: fx.GraphModule, node: fx.Node) -> None:
    """x * sigmoid(x) and x * hardsigmoid(x)"""
    for x, gate in _factors(traced, node):
        module = nodes.module_of(traced, gate)
        if isinstance(module, nn.Sigmoid | nn.Hardsigmoid) and nodes.operand(gate) is x:
            new = nn.SiLU() if isinstance(module, nn.Sigmoid) else nn.Hardswish()
            place = nodes.places(traced)[node]
            node.args, node.kwargs = (x,), {}
            _call(traced, node, place, new)
            return


def _divided_gate(traced: fx.GraphModule, node: fx.Node) -> None:
    """x * relu6(x + 3) / 6"""
    if not _is_scaled(nodes.module_of(traced, node), 1 / 6, 0.0):
        return
    for x, gate in _factors(traced, nodes.operand(node)):
        if _is_relu6_of_x_plus_3(traced, gate) and nodes.operand(nodes.operand(gate)) is x:
            traced.set_submodule(str(node.target), nn.Hardswish())
            node.args = (x,)
            return


def _frozen_norm(traced: fx.GraphModule, node: fx.Node) -> None:
    """x * scale + shift behind a layer"""
    if isinstance(nodes.module_of(traced, node), Scaled) and (norm := norm_of_constants(traced, node)) is not None:
        traced.set_submodule(str(node.target), norm)


def _factors(traced: fx.GraphModule, node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The two tensors of a product, in both orders."""
    tensors = _tensors(node) if nodes.role(traced, node) == "multiply" else []
    return [(tensors[0], tensors[1]), (tensors[1], tensors[0])] if len(tensors) == 2 else []
