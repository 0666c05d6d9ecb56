"""A shelf of ONNX files that are broken or mean harm, each made from one tiny good network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SHAPE: list[str | int] = ["batch", 3, 8, 8]
Edit = Callable[[onnx.ModelProto], None]


def good() -> onnx.ModelProto:
    """Q/DQ, one quantized convolution, an average, ten scores."""
    constants = {
        "scale": np.float32(0.02),
        "zero": np.int8(0),
        "codes": np.ones((10, 3, 3, 3), np.int8),
        "weight_scale": np.full(10, 0.01, np.float32),
        "weight_zero": np.zeros(10, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"], "conv.q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], "conv.dq"),
        helper.make_node("DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["w"], "conv.weight", axis=0),
        helper.make_node("Conv", ["dq", "w"], ["y"], "conv.conv", pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], "flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "good",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def constant(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    found: onnx.TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def edited(edit: Edit) -> bytes:
    model = good()
    edit(model)
    return bytes(model.SerializeToString())


def _scale(name: str, value: float) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        values = numpy_helper.to_array(constant(model, name)).copy()
        values[...] = value
        constant(model, name).CopyFrom(numpy_helper.from_array(values, name))

    return edit


def _external(location: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        tensor = constant(model, "codes")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return edit


def _dims(name: str, *sizes: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        constant(model, name).dims[:] = sizes

    return edit


def _axis(value: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[2].attribute[0].i = value

    return edit


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[3].input[0] = "pooled"


def _same_output_twice(model: onnx.ModelProto) -> None:
    model.graph.node[4].output[0] = "y"


def _same_constant_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(constant(model, "scale"))


def _missing_input(model: onnx.ModelProto) -> None:
    model.graph.node[3].input[0] = "nowhere"


def _no_nodes(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 999


def _domain(model: onnx.ModelProto) -> None:
    model.graph.node[4].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _operator(model: onnx.ModelProto) -> None:
    model.graph.node[4].op_type = "Teleport"


def _subgraph(operator: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        inner = helper.make_graph([helper.make_node("Identity", ["pooled"], ["again"])], "inner", [], [])
        node = helper.make_node(operator, ["pooled"], ["never"], "control", body=inner)
        model.graph.node.append(node)

    return edit


def _function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="com.example")


def _sparse(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    indices = numpy_helper.from_array(np.zeros(1, np.int64))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1 << 40]))


def _huge_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 1 << 60


def _negative_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = -8


def _fills_memory(model: onnx.ModelProto) -> None:
    """Small in the file, 64 GB when run or folded."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 34], np.int64), "many"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["many"], ["filled"], "fill"))
    model.graph.node.append(helper.make_node("ReduceSum", ["filled"], ["sum"], "sum", keepdims=0))
    model.graph.node.append(helper.make_node("Add", ["logits_", "sum"], ["logits"], "add"))
    model.graph.node[-3].output[0] = "logits_"


def _doubled_sizes(model: onnx.ModelProto) -> None:
    """A shape joined with itself thirty times: a billion sizes that an inference would write down."""
    model.graph.node.append(helper.make_node("Shape", ["input"], ["sizes0"], "shape"))
    for index in range(30):
        names = [f"sizes{index}"] * 2, [f"sizes{index + 1}"]
        model.graph.node.append(helper.make_node("Concat", *names, f"join{index}", axis=0))


def _long_range(model: onnx.ModelProto) -> None:
    for name, value in (("start", 0), ("limit", 1 << 33), ("delta", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    model.graph.node.append(helper.make_node("Range", ["start", "limit", "delta"], ["numbers"], "range"))


def _ranges_of_the_input(model: onnx.ModelProto) -> None:
    """As long as the sum of the image: nothing says how long that is before it runs."""
    for name, value in (("start", 0.0), ("delta", 1.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    model.graph.node.append(helper.make_node("ReduceSum", ["input"], ["total"], "total", keepdims=0))
    model.graph.node.append(helper.make_node("Range", ["start", "total", "delta"], ["numbers"], "range"))


def _expanded_by_the_input(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["sizes"], "sizes", to=TensorProto.INT64))
    model.graph.node.append(helper.make_node("Expand", ["y", "sizes"], ["large"], "expand"))


def _axes_without_end(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.arange(15), "fifteen"))
    for index in range(2_000):
        names = [f"u{index}" if index else "y", "fifteen"], [f"u{index + 1}"]
        model.graph.node.append(helper.make_node("Unsqueeze", *names, f"unsqueeze{index}"))


def _long_lists(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.arange(30_000), "list"))
    for index in range(2_000):
        names = [f"l{index}" if index else "list", "list"], [f"l{index + 1}"]
        model.graph.node.append(helper.make_node("Add", *names, f"add{index}"))


def _many_nodes() -> bytes:
    return _with_more_graph(_field(1, helper.make_node("Relu", ["y"], ["y"]).SerializeToString()) * 1_000_000)


def _deep() -> bytes:
    """Ten thousand networks in each other: deeper than a recursive parser survives."""
    graph = b""
    for _ in range(10_000):
        graph = _field(1, _field(5, _field(6, graph)))
    return _with_more_graph(graph)


def _with_more_graph(more: bytes) -> bytes:
    """The good model with more of its graph in a second field 7, which protobuf merges with the first."""
    return bytes(good().SerializeToString()) + _field(7, more)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _replaced(old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    return bytes(good().SerializeToString()).replace(old, new)


SHELF: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "zeros": (lambda: bytes(100), "not a valid ONNX file"),
    "text": (lambda: b"this is no network\n" * 20, "not a valid ONNX file"),
    "truncated": (lambda: edited(lambda _: None)[:-200], "not a valid ONNX file"),
    "cut in a field": (lambda: edited(lambda _: None)[:-1], "not a valid ONNX file"),
    "no nodes": (lambda: edited(_no_nodes), "holds no network"),
    "axis beyond the rank": (lambda: edited(_axis(7)), "axis"),
    "axis of another size": (lambda: edited(_axis(1)), "axis"),
    "scale of zero": (lambda: edited(_scale("scale", 0)), "above zero"),
    "scale below zero": (lambda: edited(_scale("scale", -0.02)), "above zero"),
    "scale that is no number": (lambda: edited(_scale("scale", np.nan)), "above zero"),
    "infinite scale": (lambda: edited(_scale("scale", np.inf)), "above zero"),
    "weight scale of zero": (lambda: edited(_scale("weight_scale", 0)), "above zero"),
    "a petabyte of weights": (lambda: edited(_dims("codes", 1 << 20, 1 << 20, 32, 32)), "claims"),
    "sizes that overflow": (lambda: edited(_dims("codes", 1 << 32, 1 << 32, 1, 1)), "claim"),
    "a negative size": (lambda: edited(_dims("codes", -1, 3, 3, 3)), "claim"),
    "a huge input": (lambda: edited(_huge_input), "larger than anything"),
    "an input of negative size": (lambda: edited(_negative_input), "larger than anything"),
    "a tensor that fills memory": (lambda: edited(_fills_memory), "larger than anything"),
    "sizes that double": (lambda: edited(_doubled_sizes), "indices or sizes"),
    "a range without an end": (lambda: edited(_long_range), "larger than anything"),
    "a range of the input": (lambda: edited(_ranges_of_the_input), "values of the input"),
    "sizes of the input": (lambda: edited(_expanded_by_the_input), "values of the input"),
    "axes without end": (lambda: edited(_axes_without_end), "axes"),
    "long lists": (lambda: edited(_long_lists), "indices or sizes"),
    "a sparse tensor": (lambda: edited(_sparse), "sparse"),
    "weights in the folder above": (lambda: edited(_external("../secret")), "in another file"),
    "weights at an absolute path": (lambda: edited(_external("/etc/passwd")), "in another file"),
    "weights behind a link": (lambda: edited(_external("link")), "in another file"),
    "weights in the folder": (lambda: edited(_external("weights.bin")), "in another file"),
    "a cycle": (lambda: edited(_cycle), "not a valid ONNX file"),
    "one tensor made twice": (lambda: edited(_same_output_twice), "not a valid ONNX file"),
    "one constant twice": (lambda: edited(_same_constant_twice), "not unique"),
    "a name that is no UTF-8": (lambda: _replaced(b"conv.conv", b"conv\xff\xfeonv"), "not UTF-8"),
    "a tensor that is no UTF-8": (lambda: _replaced(b"pooled", b"poo\xc3\x28d"), "not UTF-8"),
    "a name that steers a terminal": (lambda: _replaced(b"conv.conv", b"\x1b[2Jconv]"), "control characters"),
    "unknown opset": (lambda: edited(_opset), "opset"),
    "unknown domain": (lambda: edited(_domain), "com.example"),
    "unknown operator": (lambda: edited(_operator), "Teleport"),
    "a loop": (lambda: edited(_subgraph("Loop")), "control flow"),
    "a branch": (lambda: edited(_subgraph("If")), "control flow"),
    "ten thousand networks in each other": (_deep, "control flow"),
    "a function": (lambda: edited(_function), "functions"),
    "a missing input": (lambda: edited(_missing_input), "not a valid ONNX file"),
    "a million nodes": (_many_nodes, "nodes"),
}
"""name -> (the bytes, a word of the sentence that refuses it)."""

WORST = (
    "a petabyte of weights",
    "a huge input",
    "a tensor that fills memory",
    "sizes that double",
    "a range without an end",
    "axes without end",
    "long lists",
    "a million nodes",
    "ten thousand networks in each other",
)


def shelve(name: str, path: Path) -> Path:
    """Write the file `name` of the shelf, and what it would like to read beside it."""
    path.write_bytes(SHELF[name][0]())
    if name.startswith("weights"):
        (path.parent / "weights.bin").write_bytes(bytes(270))
        (path.parent / "link").unlink(missing_ok=True)
        (path.parent / "link").symlink_to("/etc/hostname")
    return path
