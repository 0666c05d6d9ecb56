"""What torch's operators are called, and what they do to memory."""

from __future__ import annotations

from torch import Tensor, fx
from torch._ops import OpOverload


def word_of(node: fx.Node) -> str:
    """What the function that `node` calls is called in Python."""
    word = (
        base_name(node.target) if isinstance(node.target, OpOverload) else getattr(node.target, "__name__", node.name)
    )
    return _WORDS.get(word, word).strip("_")


_WORDS = {
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d", "upsample_nearest1d"), "interpolate"),
    **dict.fromkeys(("slice", "select"), "getitem"),
    "sym_size": "size",
}
ASSERTIONS = (
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


def base_name(target: OpOverload) -> str:
    """The operator's name without its namespace, its overload and the mark of writing over its input."""
    name = target._schema.name.partition("::")[2]
    return name.removesuffix("_") if target._schema.is_mutable else name


def writes_over_input(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and target._schema.is_mutable and target._schema.name.endswith("_")


COPIES = ("clone", "lift_fresh_copy", "_to_copy")
_IDLE = (
    *COPIES[:2],
    *("alias", "contiguous", "detach", "lift_fresh", "positive"),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
)
_CASTS = ("to", "type_as", "_to_copy", "_conj", "resolve_conj", "resolve_neg")


def is_idle(node: fx.Node) -> bool:
    """Whether nothing but memory comes of an operator in evaluation mode."""
    assert isinstance(node.target, OpOverload)
    name = base_name(node.target)
    if name in _IDLE or name in ASSERTIONS:
        return True
    if name not in _CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype


def views_are_written(program: fx.Graph) -> bool:
    """Whether an operator writes over what another node sees through a view: no graph without memory can say that."""
    views = {node for node in program.nodes if isinstance(node.target, OpOverload) and _is_view(node.target)}
    for node in program.nodes:
        if writes_over_input(node) and not is_idle(node):
            written = node.args[0]
            if written in views or any(reader in views for reader in written.users):
                return True
    return False


def _is_view(target: OpOverload) -> bool:
    results = target._schema.returns
    return any(result.alias_info is not None and not result.alias_info.is_write for result in results)
