"""A verification, printed for people: one line per layer and flavour, and the bounds at the end."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from faqd.deploy.verify.verify import CEIL_NOTE
from faqd.proof import codes_in_words
from faqd.saturation import HIGHEST

WIDTH = 100
"""Columns where standard output is no terminal."""


def print_verification(record: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH, no_color=True)
    for flavour, result in record["flavours"].items():
        title = f"{flavour}: quantized values on {record['probe_images']} probe inputs"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in (
            "layer",
            "torch =\nreference",
            "onnxruntime\nas written",
            "onnxruntime\noptimised",
            "values\nreached",
        ):
            table.add_column(column, overflow="fold")
        for row in result["layers"]:
            equal = "equal" if row["torch_equal"] else "DIFFERS"
            table.add_row(row["layer"], equal, _cell(row.get("plain")), _cell(row.get("optimised")), _reached(row))
        console.print(table)
        if "onnxruntime" in flavour:
            console.print(_sums(result, record["cpu"]["kind"]))
    if record.get("rounding") == "ceil":
        console.print(CEIL_NOTE)
    for name, title in (("between_flavours", "between flavours"), ("as_trained", "as trained = deployed")):
        if record.get(name):
            console.print(f"{title}: {_outputs(record[name])}")
    if "preprocessing" in record:
        same = all(compared["equal"] for compared in record["preprocessing"].values())
        console.print(f"preprocessing in the networks: {'equal' if same else 'DIFFERS'}")
    if "float16" in record:
        worst = min(layer.get("within_one_code", 1.0) for layer in record["float16"]["layers"])
        outputs = _outputs(record["float16"]["outputs"])
        console.print(f"FP16 = FP32: {outputs}; worst layer {100 * worst:.3f} % within one step")
    console.print(f"student.float.onnx = unquantized student in torch: {_outputs(record['float_student'])}")
    console.print(f"teacher.onnx = teacher in torch: {_outputs(record['teacher'])}")
    if "teacher_float16" in record:
        console.print(f"teacher FP16 = FP32: {_outputs(record['teacher_float16'])}")
    console.print(_conclusion(record))


def _sums(result: dict[str, Any], kind: str) -> str:
    """For which CPUs the comparison with onnxruntime speaks."""
    sums = result["integer_sums"]
    if not sums["layers"]:
        return "no layer is summed in integers"
    if result["every_cpu"]:
        return (
            f"on every CPU: of the {sums['layers']} layers summed in integers, two neighbouring products come to "
            f"{sums['largest_pair']:,} at most, and int16 holds {HIGHEST:,}"
        )
    names = ", ".join(sums["saturating"])
    return (
        f"on {kind} alone: in {names} two neighbouring products can pass int16, in which onnxruntime adds them on x86 "
        "CPUs with AVX2 and no VNNI; export the run again for a file that is right on all"
    )


def _conclusion(record: dict[str, Any]) -> str:
    if record["passed"]:
        return f"proof: {codes_in_words(record)}."
    said = _first_failure(record["failures"])
    if record["flavours"].get("tensorrt", {}).get("passed"):
        said += "\nThe TensorRT file passed: an engine can be built from it."
    return said


def _first_failure(failures: list[str]) -> str:
    """What went wrong first; behind a wrong layer most others are wrong as well."""
    return f"FAILED: {failures[0]}" + (f" (and {len(failures) - 1} more)" if len(failures) > 1 else "")


def _reached(row: dict[str, Any]) -> str:
    """The codes that occur, and the limits that no value was beyond: what those would change was not seen."""
    if "lowest" not in row:
        return ""
    kept = [{"low": "lower", "high": "upper"}[limit] for limit, beyond in row["beyond"].items() if not beyond]
    return f"{row['lowest']}..{row['highest']}" + (f", {' and '.join(kept)} limit not passed" if kept else "")


def _cell(compared: dict[str, Any] | None) -> str:
    if compared is None:
        return ""
    if "codes" not in compared:
        error = compared["relative_error"]
        return "not finite" if error is None else f"{error:.1e}"
    if compared["differing"] == 0:
        return "equal"
    return f"{compared['differing']} of {compared['codes']}, by {compared['largest_difference']}"


def _outputs(compared: dict[str, Any]) -> str:
    found = compared["snr_db"]
    parts = [f"{value:.1f} dB" if value is not None else "equal outputs" for value in found.values()]
    named = [f"{name} {part}" for name, part in zip(found, parts, strict=True)]
    snr = ", ".join(parts if len(parts) == 1 else named)
    top1 = compared.get("top1_agreement")
    return snr + (f", top-1 agreement {100 * top1:.2f} %" if top1 is not None else "") + f" (n = {compared['images']})"
