"""Where a node of a captured program stands in the user's network, and whether it is all that a module there does."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx, nn
from torch._ops import OpOverload

from faqd.quantize.capture.aten import is_idle


class Places:
    """program: what torch.export captured of `network`, which holds its modules if it is there, as `prefix` in it.

    users: the network's modules by place. leaves: the places of modules that call no others, and are torch's or have
    tensors: each may be one module of the new graph.
    """

    def __init__(self, program: fx.GraphModule, prefix: str, network: nn.Module | None) -> None:
        self._prefix = prefix
        self.users = dict(network.named_modules()) if network is not None else {}
        operators = [node for node in program.graph.nodes if isinstance(node.target, OpOverload)]
        holders = {name.removeprefix(prefix).rpartition(".")[0] for name in program.state_dict()}
        self.leaves = _leaves([self.around(node) for node in operators], holders)
        calls = Counter(_innermost(node) for node in operators if not is_idle(node))
        self._alone = {key for key, count in calls.items() if key is not None and count == 1}

    def around(self, node: fx.Node) -> dict[str, Any]:
        """The user's modules around a node, from outside: place -> class."""
        entries = (node.meta.get("nn_module_stack") or {}).values()
        found: dict[str, Any] = {}
        for path, kind in entries:
            inside = self._prefix[:-1]
            if path == inside or path.startswith(self._prefix) or not self._prefix:
                found[path.removeprefix(inside).removeprefix(".") if inside else path] = kind
        return found

    def of(self, node: fx.Node) -> str:
        return next(reversed(self.around(node)), "")

    def whole(self, node: fx.Node) -> str | None:
        """The place of the module that the user sees as one operator, of which the node is a part."""
        around = self.around(node)
        torchs = (place for place, kind in around.items() if place and _is_torchs_kind(kind))
        found = next(torchs, next(reversed(around), ""))
        return found if found in self.leaves or (found in self.users and is_torchs(self.users[found])) else None

    def is_all_of_its_module(self, node: fx.Node) -> bool:
        """Whether this call of the module around a node computes nothing else."""
        return _innermost(node) in self._alone

    def is_torchs(self, node: fx.Node) -> bool:
        """Whether the module around a node is one of torch's kinds."""
        return _is_torchs_kind(next(reversed(self.around(node).values()), ""))


def is_torchs(module: nn.Module) -> bool:
    """Whether a module is one of torch's kinds, which is one operator and no container."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def _is_torchs_kind(kind: Any) -> bool:
    """kind: a class, or its full name."""
    name = kind if isinstance(kind, str) else f"{kind.__module__}."
    return name.startswith("torch.nn.") and "Sequential" not in name


def _leaves(stacks: list[dict[str, Any]], holders: set[str]) -> set[str]:
    """stacks: the modules around each operator. holders: the places of modules that have tensors of their own."""
    innermost = {next(reversed(stack)) for stack in stacks if stack}
    outer = {place for stack in stacks for place in list(stack)[:-1]}
    torchs = {place for stack in stacks for place, kind in stack.items() if _is_torchs_kind(kind)}
    around = {".".join(parts[:count]) for parts in (h.split(".") for h in holders) for count in range(len(parts))}
    return {place for place in innermost & (torchs | holders) - outer - around if place}


def _innermost(node: fx.Node) -> str | None:
    """The key of the call of the innermost module, which is another one for each call."""
    return next(reversed(node.meta.get("nn_module_stack") or {}), None)
