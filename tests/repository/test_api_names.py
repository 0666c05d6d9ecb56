"""Every name of TensorRT's Python API that our code uses exists in every version that it is meant for.

api_names/names.txt, beside this file, holds what the real bindings of each version offer; collect.py there writes it.
The types that our signatures state, and those that the bindings state, tell of which class a value is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = Path(__file__).parent / "api_names" / "names.txt"
SOURCES = [
    text
    for path in sorted((ROOT / "faqd").rglob("*.py"))
    if "faqd.deploy.engine.trt " in (text := path.read_text("utf-8")) or path.name == "trt.py"
]

WEAKLY_TYPED = {"10.3", "10.7"}
NOT_EVERYWHERE = {
    # Set below 10.12 only.
    "BuilderFlag.FP16": WEAKLY_TYPED,
    "BuilderFlag.INT8": WEAKLY_TYPED,
    # Asked for with hasattr, and refused with a sentence where it is missing.
    "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY": {"10.12", "10.13", "10.16", "11.0", "11.4"},
}
COMPUTED = {
    "ProfilingVerbosity": ("NONE", "LAYER_NAMES_ONLY", "DETAILED"),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"),
}
"""What getattr with a computed name may ask of a class."""

OUR_WORDS = {"Plan": "IHostMemory", "TensorRT": "TensorRT"}


@dataclass
class Api:
    """versions: all of them. have: name -> the versions that have it. held: name -> the class it gives."""

    versions: set[str] = field(default_factory=set)
    have: dict[str, set[str]] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)


def read_names() -> Api:
    api = Api()
    for line in NAMES.read_text("utf-8").splitlines():
        if line.startswith("#"):
            api.versions |= set(line.partition("versions: ")[2].split())
            continue
        left, _, versions = line.partition(" | ")
        name, _, held = left.partition(" -> ")
        api.have[name] = set(versions.split()) or api.versions
        api.held[name] = held
    return api


API = read_names()
CLASSES = {name for name in API.have if "." not in name}
MEMBERS = {name.partition(".")[2] for name in API.have if "." in name}


class Reader(ast.NodeVisitor):
    """Walks a module in order and notes `used`, the names of TensorRT in it, and `unclear`, what it could not place.

    A value's kind is a class's name, `class X` for the class itself, `list X`, `module`, `ours`, `library` for what
    other imports hold, or None where unknown.
    """

    def __init__(self, returned: dict[str, ast.expr | None]) -> None:
        self.returned = returned
        self.kinds: dict[str, str | None] = {}
        self.used: set[str] = set()
        self.unclear: set[str] = set()

    # What a value is ----------------------------------------------------------------------------------------------

    def kind(self, node: ast.expr | None) -> str | None:
        match node:
            case ast.Name():
                return "ours" if node.id == "self" else self.kinds.get(node.id)
            case ast.Attribute():
                return self._attribute(node)
            case ast.Call():
                return self._call(node)
            case ast.ListComp() | ast.GeneratorExp():
                return f"list {held}" if (held := self.kind(node.elt)) else None
        return None

    def _attribute(self, node: ast.Attribute) -> str | None:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self.kinds.get(f"self.{node.attr}")
        owner = self.kind(node.value)
        if owner == "TensorRT":
            return "module" if node.attr == "module" else None
        if owner == "module":
            return f"class {node.attr}" if node.attr in CLASSES else None
        if owner == "library":
            return owner
        if owner is None or owner == "ours" or owner.startswith("list "):
            return None
        return API.held.get(f"{owner.removeprefix('class ')}.{node.attr}") or None

    def _call(self, node: ast.Call) -> str | None:
        if isinstance(node.func, ast.Name) and node.func.id in self.returned:
            return annotated(self.returned[node.func.id])
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self":
            return annotated(self.returned.get(node.func.attr))
        held = self.kind(node.func)
        return held.removeprefix("class ") if held else None

    # What is used -------------------------------------------------------------------------------------------------

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.kind(node.value)
        if owner == "module":
            if node.attr != "__version__":
                self.used.add(node.attr)
        elif (
            owner is not None
            and not owner.startswith(("TensorRT", "ours", "library", "list "))
            and node.attr != "__init__"
        ):
            self.used.add(f"{owner.removeprefix('class ')}.{node.attr}")
        elif owner is None and "_" in node.attr.strip("_") and node.attr in MEMBERS:
            self.unclear.add(ast.unparse(node))
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        """TensorRT is never imported by name, so that these are other libraries' values."""
        self.kinds |= {(alias.asname or alias.name).partition(".")[0]: "library" for alias in node.names}

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            owner = (self.kind(node.args[0]) or "").removeprefix("class ")
            match node.args[1]:
                case ast.Constant(value=str(name)) if owner in CLASSES:
                    self.used.add(f"{owner}.{name}")
                case _ if owner in CLASSES:
                    self.used |= {f"{owner}.{name}" for name in COMPUTED[owner]}
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self.kinds[argument.arg] = annotated(argument.annotation)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in filter(None, (self.kind(one) for one in node.bases)):  # A class of TensorRT that we fill in.
            methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef))
            self.used |= {f"{base.removeprefix('class ')}.{name}" for name in methods if not name.startswith("_")}
        for one in ast.walk(node):  # An attribute of self may be read above where it is set.
            if isinstance(one, (ast.Assign, ast.AnnAssign, ast.FunctionDef)):
                self._learn(one)
        self.generic_visit(node)

    def _learn(self, node: ast.Assign | ast.AnnAssign | ast.FunctionDef) -> None:
        if isinstance(node, ast.FunctionDef):
            for argument in node.args.args:
                self.kinds[argument.arg] = annotated(argument.annotation)
        elif node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self._bind(target, self.kind(node.value))

    def visit_Assign(self, node: ast.Assign) -> None:
        self._learn(node)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._learn(node)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, (self.kind(node.iter) or "").removeprefix("list ") or None)
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            call = item.context_expr
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Name)
                and isinstance(item.optional_vars, ast.Tuple)
            ):
                parts = yielded(self.returned.get(call.func.id))
                for target, part in zip(item.optional_vars.elts, parts, strict=False):
                    self._bind(target, annotated(part))
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> None:
        for one in node.generators:
            self._bind(one.target, (self.kind(one.iter) or "").removeprefix("list ") or None)
        self.generic_visit(node)

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = _comprehension

    def _bind(self, target: ast.expr, kind: str | None) -> None:
        match target:
            case ast.Name():
                self.kinds[target.id] = kind
            case ast.Attribute(value=ast.Name(id="self")):
                self.kinds[f"self.{target.attr}"] = kind or self.kinds.get(f"self.{target.attr}")


def annotated(annotation: ast.expr | None) -> str | None:
    match annotation:
        case ast.Name():
            name = OUR_WORDS.get(annotation.id, annotation.id)
            return name if name in CLASSES or name == "TensorRT" else None if name == "Any" else "ours"
        case ast.Subscript(value=ast.Name(id="list"), slice=ast.Name() as inner):
            return f"list {held}" if (held := annotated(inner)) else None
    return None


def yielded(annotation: ast.expr | None) -> list[ast.expr]:
    """The parts of Iterator[tuple[A, B]]."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="Iterator"), slice=ast.Subscript(slice=ast.Tuple(elts=parts))):
            return parts
    return []


def functions(source: str) -> Iterator[tuple[str, ast.expr | None]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.returns


def read(sources: list[str]) -> tuple[set[str], set[str]]:
    """(names used, values of unknown class whose attribute has a name of TensorRT's) in all the sources."""
    returned = dict(pair for source in sources for pair in functions(source))
    used: set[str] = set()
    unclear: set[str] = set()
    for source in sources:
        reader = Reader(returned)
        reader.visit(ast.parse(source))
        used |= reader.used
        unclear |= reader.unclear
    return used, unclear


def missing(used: set[str]) -> dict[str, set[str]]:
    """Used names with the versions that should have them and do not."""
    gaps = {name: NOT_EVERYWHERE.get(name, API.versions) - API.have.get(name, set()) for name in used}
    return {name: lacking for name, lacking in gaps.items() if lacking}


def test_every_name_of_tensorrt_exists_in_every_version() -> None:
    used, unclear = read(SOURCES)
    assert missing(used) == {}
    assert unclear == set(), "of which class are these? Annotate them with the words of faqd/deploy/engine/trt.py"
    assert NOT_EVERYWHERE.keys() <= used, "an exception without a use"


def test_the_names_that_matter_are_among_them() -> None:
    used, _ = read(SOURCES)
    assert used >= {
        "Builder",
        "Builder.build_serialized_network",
        "Builder.create_network",
        "BuilderFlag.INT8",
        "IExecutionContext.execute_async_v3",
        "IBuilderConfig.progress_monitor",
        "ICudaEngine.create_engine_inspector",
        "EngineInspector.get_engine_information",
        "ILayer.get_output",
        "ILogger.log",
        "IOptimizationProfile.set_shape",
        "IProgressMonitor.step_complete",
        "ITensor.dtype",
        "ITimingCache.serialize",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.parse",
        "ParserError.desc",
        "Runtime.deserialize_cuda_engine",
    }


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        ("builder.build_serialized_network(", "builder.build_network(", "Builder.build_network"),
        ("config.set_memory_pool_limit(", "config.max_workspace_size(", "IBuilderConfig.max_workspace_size"),
        ("trt.module.OnnxParser(", "trt.module.UffParser(", "UffParser"),
        ("MemoryPoolType.WORKSPACE", "MemoryPoolType.SCRATCH", "MemoryPoolType.SCRATCH"),
        ("layer.num_outputs", "layer.outputs", "ILayer.outputs"),
        ("error.node_operator()", "error.operator()", "ParserError.operator"),
        ("engine.get_tensor_profile_shape(", "engine.get_profile_shape(", "ICudaEngine.get_profile_shape"),
        ("self._context.execute_async_v3(", "self._context.execute_async_v2(", "IExecutionContext.execute_async_v2"),
        ("def step_complete(", "def step_done(", "IProgressMonitor.step_done"),
        ("flags.FP16", "flags.FP12", "BuilderFlag.FP12"),
    ],
)
def test_a_wrong_name_is_found(right: str, wrong: str, found: str) -> None:
    changed = [source.replace(right, wrong) for source in SOURCES]
    assert changed != SOURCES, f"nothing reads {right} any more"
    assert found in missing(read(changed)[0])


def test_a_name_that_is_gone_in_some_versions_is_found() -> None:
    assert missing({"ILayer.precision", "Builder.create_network"}) == {"ILayer.precision": {"11.0", "11.4", "rtx-1.7"}}
    assert API.versions == {"10.3", "10.7", "10.12", "10.13", "10.16", "11.0", "11.4", "rtx-1.7"}
