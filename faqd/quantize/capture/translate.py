"""A program of torch.export as a graph in the quantizer's terms: layers and activations at the user's own places.

What each of torch's operators becomes, the rows in `faqd/quantize/operators` say; here is what holds for all of them:
names, places, lines of the user's code, operators that write over their input.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from faqd.errors import UserError
from faqd.quantize.capture.aten import ASSERTIONS, COPIES, base_name, is_idle, word_of, writes_over_input
from faqd.quantize.capture.places import Places, is_torchs
from faqd.quantize.nodes import PART_OF, line_of_code, unused
from faqd.quantize.operators.registry import RULES
from faqd.quantize.operators.row import Call, Pieces


class Translation:
    """program: what torch.export captured, with its tensors. network: whose modules it names, if it is there."""

    def __init__(self, program: fx.GraphModule, prefix: str, network: nn.Module | None) -> None:
        self._program, self._prefix = program, prefix
        self._places = Places(program, prefix, network)
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.held: dict[fx.Node, Tensor] = {}
        self._paths: dict[fx.Node, str] = {}
        self._value: dict[fx.Node, Any] = {}
        self._memory: dict[fx.Node, fx.Node] = {}
        self._made: dict[tuple[Any, ...], str] = {}
        self._put_at: set[str] = set()
        self._reader: fx.Node | None = None
        self._other_word: str | None = None
        tensors = (name.removeprefix(prefix) for name in program.state_dict())
        places = (place for node in program.graph.nodes for place in self._places.around(node))
        self._taken = {*tensors, *self._places.users, *places}
        for name in program.state_dict():  # in the user's order, which is that of the state dict
            self._container(name.removeprefix(prefix).rpartition(".")[0])

    def run(self, returned: Callable[[list[Any]], Any]) -> fx.GraphModule:
        """The graph with its modules. returned: what the user's forward makes of the list of its outputs."""
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                self._value[node] = self.graph.placeholder(node.name)
                self._value[node].meta["val"] = node.meta["val"]
            elif node.op == "get_attr":
                self._value[node] = self._fetched(node)
            elif node.op == "call_function":
                self._translate(node)
            elif node.op == "output":
                self.graph.output(returned(list(self._mapped(node.args[0]))))
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self._drop_unread()
        network = fx.GraphModule(self.root, self.graph)
        _bring_into_order(network, self.root)
        return network

    def _mapped(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self._value[node])

    def _fetched(self, node: fx.Node) -> Any:
        found: Any = self._program
        for name in str(node.target).split("."):
            found = getattr(found, name)
        if not isinstance(found, Tensor):
            return found  # the graph of a block, such as torch.no_grad makes one
        path = str(node.target).removeprefix(self._prefix)
        place, _, name = path.rpartition(".")
        holder = self._container(place)
        if isinstance(found, nn.Parameter):
            holder.register_parameter(name, found)
        else:
            holder.register_buffer(name, found)
        new = self.graph.get_attr(path)
        new.meta["val"] = node.meta.get("val", found)
        self.held[new], self._paths[new] = found, path
        return new

    def _translate(self, node: fx.Node) -> None:
        if node.target is operator.getitem and isinstance(pieces := self._value.get(node.args[0]), Pieces):  # type: ignore[arg-type]
            if node.users:
                with self.named(reader=node):
                    self._value[node] = pieces[operator.index(node.args[1])]()  # type: ignore[arg-type]
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._value[node] = self._block(node)
            return
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        if not isinstance(node.target, OpOverload):  # arithmetic of sizes
            self._value[node] = self.call_function(node, node.target, args, kwargs)  # type: ignore[arg-type]
            return
        name = base_name(node.target)
        if name in ASSERTIONS:
            return
        rule = RULES.get(name)
        made = None
        if is_idle(node):
            made = args[0]
        elif rule is not None:
            call = Call(self, node, args, kwargs)
            made = rule(call)
            if isinstance(made, nn.Module):
                made = call.module(made)
        if made is None:
            made = self._unknown(node, args, kwargs)
        self._value[node] = made
        written = node.args[0] if node.args else None
        if isinstance(written, fx.Node) and (writes_over_input(node) or (is_idle(node) and name not in COPIES)):
            self._memory[node] = self._memory.get(written, written)
        if writes_over_input(node):
            for other in (*self._value,):  # whatever reads that memory from here on reads what was written
                if self._memory.get(other, other) is self._memory[node]:
                    self._value[other] = made

    @contextmanager
    def named(self, word: str | None = None, reader: fx.Node | None = None) -> Iterator[None]:
        """Lets what is made meanwhile be called `word`, or after `reader`, a piece of what an operator returns."""
        before = self._other_word, self._reader
        self._other_word, self._reader = word or self._other_word, reader or self._reader
        try:
            yield
        finally:
            self._other_word, self._reader = before

    def _unknown(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        target: Any = node.target
        if writes_over_input(node):
            target = getattr(getattr(torch.ops.aten, base_name(target), None), target._overloadname, target)
        user = self._places.users.get(self._places.of(node))
        read = [a for a in args if isinstance(a, fx.Node) and a not in self.held]
        if user is not None and self._places.is_all_of_its_module(node) and len(read) == 1 and is_torchs(user):
            module = copy.copy(user)
            module._parameters, module._buffers = dict(user._parameters), dict(user._buffers)
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node) and a in self.held]
            return self.call_module(node, module, read[0], tensors)
        return self.call_function(node, target, args, kwargs)

    def _block(self, node: fx.Node) -> Any:
        """What a block of the user's forward returns that torch keeps apart, such as one of torch.no_grad."""
        name = str(node.target)
        if not name.startswith("wrap_with"):
            raise UserError(
                f"{self._places.of(node) or name}{line_of_code(node)}: {name} chooses what to compute by values; what "
                "is deployed computes the same for every image."
            )
        block = next(
            self._value[a] for a in node.args if isinstance(a, fx.Node) and isinstance(self._value[a], nn.Module)
        )
        tensors = [self._value[a] for a in node.args if isinstance(a, fx.Node) and self._value[a] is not block]
        for inner in block.graph.nodes:
            if inner.op == "placeholder":
                self._value[inner] = tensors.pop(0)
            elif inner.op == "get_attr":
                self._value[inner] = getattr(block, inner.target)
            elif inner.op == "call_function":
                self._translate(inner)
            else:
                returned = self._mapped(inner.args[0])
        return Pieces([partial(_itself, value) for value in returned])

    # Nodes and places -------------------------------------------------------------------------------------------

    def call_function(self, node: fx.Node, target: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
        place, word = self._places.of(node), self._word(node)
        inside = self._places.around(node)
        if place in self._places.leaves:  # whose place is a module's: this function stands beside it
            word = f"{place.rpartition('.')[2]}_{word}"
            inside.pop(place)
        new = self.graph.create_node("call_function", target, tuple(args), dict(kwargs), name=word)
        return self._like(new, node, inside)

    def call_module(self, node: fx.Node, module: nn.Module, x: Any, tensors: list[fx.Node] | None = None) -> fx.Node:
        place = self._places.of(node)
        own = self._is_all_of(place, node, module, tensors or [])
        path = self._own_path(place, module, bool(tensors)) if own else self._put(self._beside(node), module)
        name = place.replace(".", "_") if own else self._word(node)
        new = self.graph.create_node("call_module", path, (x,), {}, name=name)
        return self._like(new, node, self._places.around(node) | {path: type(module)})

    def _like(self, new: fx.Node, node: fx.Node, inside: dict[str, Any]) -> fx.Node:
        if (whole := self._places.whole(node)) is not None:
            new.meta[PART_OF] = whole
        node = self._reader or node
        new.meta["val"] = node.meta.get("val")
        new.meta["nn_module_stack"] = {place: (place, kind) for place, kind in inside.items()}
        new.stack_trace = node.stack_trace
        return new

    def _is_all_of(self, place: str, node: fx.Node, module: nn.Module, tensors: list[fx.Node]) -> bool:
        """Whether `module` stands for all of the user's module at `place`."""
        if place not in self._places.leaves:
            return False
        if tensors:
            return self._are_all_of(place, module, tensors)
        return self._places.is_all_of_its_module(node) and self._places.is_torchs(node)

    def _own_path(self, place: str, module: nn.Module, shared: bool) -> str:
        """Where a module goes that is the user's at `place`. shared: whether other calls of it may be this one."""
        settings = (place, type(module), module.extra_repr())
        if shared and settings in self._made:
            return self._made[settings]
        free = place if place not in self._put_at else unused(place, self._taken)
        self._made[settings] = self._put(free, module)
        return free

    def _beside(self, node: fx.Node) -> str:
        """Where a module goes that is a piece of what the user's module does, which may be replaced as a whole."""
        place, word = self._places.of(node), self._word(node)
        wanted = f"{place}_{word}" if place in self._places.leaves else f"{place}.{word}" if place else word
        return unused(wanted, self._taken)

    def _are_all_of(self, place: str, module: nn.Module, tensors: list[fx.Node]) -> bool:
        """Whether `module` holds tensors of the user's module at `place`, by the names that they have there."""
        user = self._places.users.get(place)
        if user is None:
            return all(self._paths[tensor].rpartition(".")[0] == place for tensor in tensors)
        held = {id(self.held[tensor]) for tensor in tensors}
        named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        return all(getattr(user, name, None) is value for name, value in named if id(value) in held)

    def _put(self, path: str, module: nn.Module) -> str:
        place, _, name = path.rpartition(".")
        holder = self._container(place)
        before = holder._modules.get(name)
        holder.add_module(name, module)
        for key, value in before.named_buffers() if before is not None else ():
            if key == "num_batches_tracked" and key in module._buffers:
                module._buffers[key] = value
        self._put_at.add(path)
        return path

    def _container(self, place: str) -> nn.Module:
        found: Any = self.root
        for name in filter(None, place.split(".")):
            if name not in found._modules:
                found.add_module(name, nn.Module())
            found = found._modules[name]
        return found  # type: ignore[no-any-return]

    def _drop_unread(self) -> None:
        """Forget the tensors that modules hold now."""
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        for path in set(self._paths.values()) - read:
            place, _, name = path.rpartition(".")
            holder = self._container(place)
            if place not in self._put_at and (name in holder._parameters or name in holder._buffers):
                delattr(holder, name)

    def _word(self, node: fx.Node) -> str:
        return self._other_word or word_of(self._reader or node)


def _bring_into_order(network: nn.Module, like: nn.Module) -> None:
    """Let the modules of `network` follow each other as those of `like` do."""
    known = [name for name in like._modules if name in network._modules]
    network._modules = {name: network._modules[name] for name in dict.fromkeys([*known, *network._modules])}
    for name in known:
        child, other = network._modules[name], like._modules[name]
        if child is not None and other is not None and child is not other:
            _bring_into_order(child, other)


def _itself(value: Any) -> Any:
    return value
