"""The outputs of a network by name: what a forward returns, tuples and dictionaries taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from faqd.at_once import images_at_once
from faqd.quantize.nodes import unused

SINGLE = "logits"
"""The name of an only output, and the beginning of the names of a tuple's."""
INPUT = "input"
"""What the input is called in a file, where the network has no name for it (`called_input`)."""
_CALLED = "faqd_called"


def named_outputs(returned: Any) -> dict[str, Any]:
    """The leaves of what a network returns, in torch's order: `logits`; `logits_0`, `logits_1` of a tuple; the keys of
    a dictionary or of a named tuple; `boxes_0` where a dictionary holds a list. Other characters than those of a tensor
    in an ONNX file (letters, digits, _ . / : -) become _. A name that is taken gets _1, _2 ... appended."""
    taken, front = {INPUT}, _front(returned)
    return {unused("_".join(map(_word, (*front, *keys))), taken): value for keys, value in _leaves(returned)}


def returned_at(returned: Any) -> dict[str, str]:
    """Where in what a network returns its outputs are, by their names: `['a'][0]`, or nothing for an only one."""
    places = ["".join(f"[{key!r}]" for key in keys) for keys, _ in _leaves(returned)]
    return dict(zip(named_outputs(returned), places, strict=True))


def renamed(returned: Any) -> dict[str, str]:
    """Where the outputs are that have another name than their keys make."""
    front = _front(returned)
    plain = ["_".join(map(str, (*front, *keys))) for keys, _ in _leaves(returned)]
    found = returned_at(returned)
    return {name: found[name] for name, keys in zip(found, plain, strict=True) if name != keys}


def call_input(network: fx.GraphModule, name: str) -> None:
    """Let the image of a captured network be called `name` in files."""
    _image(network).meta[_CALLED] = name


def called_input(network: fx.GraphModule) -> str:
    """What the image of a captured network is called in files."""
    name: str = _image(network).meta.get(_CALLED, INPUT)
    return name


def _image(network: fx.GraphModule) -> fx.Node:
    (image,) = (node for node in network.graph.nodes if node.op == "placeholder")
    found: fx.Node = image
    return found


def graph_outputs(network: fx.GraphModule) -> dict[str, Any]:
    """The nodes that a captured network returns, by the names of its outputs."""
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    return named_outputs(output.args[0])


@torch.no_grad()
def run_batches(network: Any, inputs: Tensor, most: int) -> dict[str, Tensor]:
    """float32 outputs of `network` for all of `inputs` (N, C, H, W), at most so many at once."""
    parts = [named_outputs(network(some)) for some in inputs.split(images_at_once(inputs.shape[2:], most))]
    return {name: torch.cat([part[name].float() for part in parts]) for name in parts[0]}


def _leaves(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Each value that is no container, with the keys that lead to it."""
    if is_named_tuple(value):
        value = value._asdict()
    if not isinstance(value, Mapping | list | tuple):
        yield keys, value
        return
    for key, entry in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(entry, (*keys, key))


def is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_asdict")


def _front(returned: Any) -> tuple[str, ...]:
    """What stands before the keys in a name."""
    return () if isinstance(returned, Mapping) or is_named_tuple(returned) else (SINGLE,)


def _word(key: Any) -> str:
    return re.sub(r"[^\w./:-]", "_", str(key)) or "_"
