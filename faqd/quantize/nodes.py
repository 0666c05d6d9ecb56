"""What the nodes of a captured network mean to the quantizer: roles, shapes and places.

Every node has a place: the path of its module in the user's network, such as `stages.0.1.relu2`, or the path of
the enclosing module and the function's name, such as `stages.0.1.add`. Messages, tensor names and tables use it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._pytree import tree_leaves, tree_map_only

from faqd.quantize.operators.registry import of_function, of_module
from faqd.quantize.operators.row import OWN, Operator, Role

MOVES: tuple[Role, ...] = ("reshape", "concat")
"""What codes pass through."""
_TRACERS = (str(Path(torch.__file__).parent), str(Path(__file__).with_name("capture")))
"""Where code lies that stands between the user's and a node."""
_READER = "from_onnx"
"""The folder of what a network of an ONNX file is made of: no line of the user's is in it, the place names his node."""


def propagate(traced: fx.GraphModule, example: Tensor) -> None:
    """Write each node's shape into its meta data; of what is no tensor, such as a size, the value."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _Shapes(traced).run(example)


def two_of(images: Tensor) -> Tensor:
    """Two images for shapes, of which a single one says less."""
    return images[:2] if len(images) > 1 else images.repeat(2, *[1] * (images.dim() - 1))


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:  # whatever an operator raises where sizes do not meet
            raise RuntimeError(n.name) from error
        found = tree_map_only(Tensor, _extract_tensor_metadata, result)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            n.meta["tensor_meta"] = found
        else:
            n.meta[_FIXED] = result
        read = (each for each in n.all_input_nodes if not is_fixed(each))
        n.meta[OWN] = n.op != "placeholder" and all(each.meta[OWN] for each in read)
        return result


_FIXED = "faqd_fixed"
STAYS_FLOAT = "faqd_stays_float"
"""The key of a node's meta data that says that no codes pass through it."""
PART_OF = "faqd_part_of"
"""The key of a node's meta data that names the place of the user's module of which the node is a piece."""


def is_own(node: fx.Node) -> bool:
    """Whether `node` depends on no image, but on the network's own tensors and on sizes alone."""
    return bool(node.meta.get(OWN, False))


def is_fixed(node: fx.Node) -> bool:
    """Whether `node` is a size, or another value that is no tensor."""
    return _FIXED in node.meta


def fixed(argument: Any) -> Any:
    """An argument of a call with the values of the sizes in it, those of two images (shapes propagated)."""
    return fx.node.map_arg(argument, lambda node: node.meta.get(_FIXED, node))


def role(traced: fx.GraphModule, node: fx.Node) -> Role:
    """What `node` does, in the quantizer's terms; `other` is an operator it does not know."""
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    row = row_of(traced, node)
    if row is None or (row.role in MOVES and node.meta.get(STAYS_FLOAT)):
        return "other"
    return row.role


def row_of(traced: fx.GraphModule, node: fx.Node) -> Operator | None:
    """What the quantizer knows of the operator that `node` calls; None for one that it does not know."""
    module = module_of(traced, node)
    return of_function(node.target) if module is None else of_module(module)


def is_tensor(node: fx.Node) -> bool:
    return "tensor_meta" in node.meta and hasattr(node.meta["tensor_meta"], "shape")


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls; None for any other node."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def held_tensor(traced: fx.GraphModule, node: fx.Node) -> Tensor:
    """The parameter or buffer that `node` fetches."""
    path, _, name = str(node.target).rpartition(".")
    found: Tensor = getattr(traced.get_submodule(path), name)
    return found


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.all_input_nodes if is_tensor(argument)]


def values_of(traced: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator reads; behind the first of one that only reshapes, there are sizes."""
    return node.all_input_nodes[:1] if role(traced, node) == "reshape" else node.all_input_nodes


def operand(node: fx.Node) -> fx.Node:
    """The tensor that an operator of one input reads, however the user passed it."""
    return node.all_input_nodes[0]


def reached(start: Iterable[fx.Node], onward: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """Each node once to which a walk comes. onward: where it goes on from a node."""
    ahead, seen = list(start), set[fx.Node]()
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead.extend(onward(node))


def depending_on(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node, and what reads that."""
    return reached(node.users, lambda reader: reader.users)


def read_instead(node: fx.Node, new: fx.Node) -> None:
    """Let every reader of `node` but `new` read `new`."""
    node.replace_all_uses_with(new, delete_user_cb=lambda reader: reader is not new)


def after_norm(network: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The batch norm that alone reads `node`, or `node` itself."""
    readers = list(node.users)
    if len(readers) == 1 and role(network, readers[0]) == "norm":
        return readers[0]
    return node


def called_behind(traced: fx.GraphModule, node: fx.Node, place: str, module: nn.Module) -> fx.Node:
    """The call of `module` on what `node` gives, which all its readers then read; `place` or the next that is free."""
    path = unused(place, {name for name, _ in traced.named_modules()})
    traced.add_submodule(path, module)
    with traced.graph.inserting_after(node):
        new = traced.graph.call_module(path, (node,))
    new.stack_trace = node.stack_trace
    new.meta |= {key: value for key, value in node.meta.items() if key in ("tensor_meta", OWN)}
    read_instead(node, new)
    return new


def places(traced: fx.GraphModule) -> dict[fx.Node, str]:
    """A unique place for every node; a module or function used again gets _1, _2 ... appended, and so does a function
    with the name of a parameter or a buffer."""
    own = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    taken = own | {name for name, _ in (*traced.named_parameters(), *traced.named_buffers())}
    found = {}
    for node in traced.graph.nodes:
        place = _place(node)
        if node.op == "call_module" and place in own:
            own.remove(place)
        else:
            place = unused(place, taken)
        found[node] = place
    return found


def unshare(traced: fx.GraphModule, wanted: Callable[[nn.Module], bool] = lambda module: True) -> None:
    """Give every call of a `wanted` module a copy of its own: what two calls of one become differs in size or scale."""
    for node, place in places(traced).items():
        module = module_of(traced, node)
        if module is not None and place != node.target and wanted(module):
            traced.add_submodule(place, copy.deepcopy(module))
            node.target = place
            node.meta.pop("nn_module_stack", None)  # names the shared module, and with it nodes of the exported file


def _place(node: fx.Node) -> str:
    if node.op in ("call_module", "placeholder"):
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(stack.values())), "")
    word = re.sub(r"_\d+$", "", node.name).lstrip("_")
    return f"{path}.{word}" if path else word


def unused(name: str, taken: set[str]) -> str:
    """`name`, or the first of name_1, name_2 ... that is not `taken`; it is taken from now on."""
    candidate, count = name, 1
    while candidate in taken:
        candidate, count = f"{name}_{count}", count + 1
    taken.add(candidate)
    return candidate


def line_of_code(node: fx.Node) -> str:
    """Where the user's code calls this node: ` (file:line)`, or nothing if unknown."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
    return innermost([(file, int(line)) for file, line in frames])


def innermost(frames: list[tuple[str, int]]) -> str:
    """The last frame that is not a tracer's, as ` (file:line)`."""
    outside = [(file, line) for file, line in frames if not file.startswith(_TRACERS)]
    if not outside or Path(outside[-1][0]).parent.name == _READER:
        return ""
    file, line = outside[-1]
    return f" ({file}:{line})"


def with_taps(traced: fx.GraphModule, names: list[str]) -> fx.GraphModule:
    """A copy that returns (output, [tap, ...]) for the nodes of these names; it shares the parameters."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(traced.graph, copied)
    by_name = {node.name: new for node, new in copied.items()}
    graph.output((output, [by_name[name] for name in names]))
    return fx.GraphModule(traced, graph)
