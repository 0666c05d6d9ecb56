"""faqd-deploy: options to one call each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from faqd.command import SETTINGS, Group, emit_json, json_option, run, section, version_option, writable
from faqd.data_flags import MOVED_DATA, absolute_source, data_values, refuse_idle_labels
from faqd.deploy.options import (
    FOLDER,
    builder_flags,
    built_flags,
    bundle_flags,
    engine_flags,
    engine_output_flags,
    float_flags,
    keep_float_option,
    min_fidelity_option,
    predict_flags,
    quantization,
    shape_flags,
)
from faqd.errors import UserError
from faqd.given import refuse_idle
from faqd.sweep import members


@click.group(cls=Group, context_settings=SETTINGS)
@version_option
def cli() -> None:
    """Lower a student to ONNX Q/DQ and a TensorRT INT8 engine, and prove that nothing was lost."""


def main() -> None:
    run(cli)


@cli.command()
@click.argument("run_folder", metavar="RUN", type=FOLDER)
@section(
    "Data",
    *MOVED_DATA,
    click.option(
        "--eval-data",
        metavar="SOURCE",
        show_default="the run's",
        help="Evaluate on folder:PATH or another source as --data has them, none of which the run has learned from.",
    ),
    click.option("--labels", is_flag=True, help="Take the subfolder names of that folder for classes."),
)
@bundle_flags
def export(
    run_folder: Path,
    data: str | None,
    data_root: Path | None,
    eval_data: str | None,
    labels: bool,
    out: Path,
    eval_samples: int | None,
    float_type: Any,
    input_form: Any,
    servers: Any,
    licence: str | None,
    min_fidelity: float | None,
    json_target: str | None,
) -> None:
    """Write the bundle of a distilled student, and verify it.

    Of a folder of runs, as `distill` writes it for lists of bits and several seeds, it writes a folder of bundles.
    """
    from faqd.deploy import sweep
    from faqd.deploy.bundle_facts import BundleOptions
    from faqd.deploy.conclusion import conclude, conclude_all
    from faqd.deploy.write_bundle import export_run

    options = BundleOptions(eval_samples, float_type, input_form, servers, licence)
    if labels and not eval_data:
        raise UserError("--labels: the run knows whether its own images have labels; give it with --eval-data.")
    refuse_idle_labels(labels, eval_data)
    evaluation = (str(absolute_source(eval_data)), labels) if eval_data else None

    def write(run: Path, target: Path) -> Any:
        return export_run(run, target, options, _say, data_root, absolute_source(data), evaluation)

    if runs := members(run_folder, sweep.RUN_RECORD):
        made, failed = sweep.exported(runs, out, write, _say)
        conclude_all(made, failed, json_target, min_fidelity)
        return
    bundle = write(run_folder, out)
    conclude(bundle, json_target, min_fidelity)


@cli.command()
@float_flags
@keep_float_option
@bundle_flags
def ptq(
    teacher: str,
    teacher_weights: Path | None,
    keep_float: int,
    out: Path,
    eval_samples: int | None,
    float_type: Any,
    input_form: Any,
    servers: Any,
    licence: str | None,
    min_fidelity: float | None,
    json_target: str | None,
    **options: Any,
) -> None:
    """Quantize a float network without training: the baseline, as a bundle of the same kind.

    With --keep-float it also chooses what stays float, on images of the validation split.
    """
    from faqd.deploy.bundle_facts import BundleOptions
    from faqd.deploy.conclusion import conclude
    from faqd.deploy.write_bundle import quantize_after_training

    bits, chosen = quantization(options)
    chosen = replace(chosen, keep_float=keep_float, enough=chosen.enough if min_fidelity is None else min_fidelity)
    if bits.target == "onnxruntime":
        refuse_idle(["--float-type"], "--target onnxruntime writes no TensorRT file")
    asked = BundleOptions(eval_samples, float_type, input_form, servers, licence)
    bundle = quantize_after_training(teacher, teacher_weights, data_values(options), bits, chosen, out, asked, _say)
    conclude(bundle, json_target, min_fidelity)


@cli.command()
@float_flags
@section(
    "Output",
    click.option(
        "--images", type=click.IntRange(2), default=32, help="Look at so many images, on which no scale is chosen."
    ),
    click.option("--chart", type=FOLDER, callback=writable, metavar="FILE.svg", help="Draw what every rounding costs."),
    json_option,
)
def sensitivity(
    teacher: str,
    teacher_weights: Path | None,
    images: int,
    chart: Path | None,
    json_target: str | None,
    **options: Any,
) -> None:
    """Say which quantizers cost a float network most, and what to keep float so that its outputs are kept."""
    from faqd.deploy.sensitivity import lines
    from faqd.deploy.sensitivity import sensitivity as found_by
    from faqd.deploy.sensitivity_chart import write_chart

    bits, chosen = quantization(options)
    record = found_by(teacher, teacher_weights, data_values(options), bits, chosen, images, _say)
    if json_target != "-":
        click.echo("\n".join(lines(record)))
    if chart is not None:
        write_chart(chart, record)
    emit_json(json_target, record)


@cli.command()
@click.argument("bundle_folder", metavar="BUNDLE", type=FOLDER)
@min_fidelity_option
@json_option
def verify(bundle_folder: Path, min_fidelity: float | None, json_target: str | None) -> None:
    """Prove a bundle again: torch, integer reference and onnxruntime, layer by layer.

    Exit code 1 if a bound does not hold. The result is kept in verify.json of the bundle, where that can be written to.
    """
    from faqd.bundle import load_bundle
    from faqd.deploy.conclusion import exit_if_failed, fidelity_lines, keep
    from faqd.deploy.verify.table import print_verification
    from faqd.deploy.verify.verify import verified

    bundle = load_bundle(bundle_folder)
    record = verified(bundle)
    if json_target != "-":
        print_verification(record)
        click.echo("\n".join(fidelity_lines(bundle, record)))
    emit_json(json_target, record)
    keep(bundle, record, _say)
    exit_if_failed(record, min_fidelity)


@cli.command()
@click.argument("source", metavar="BUNDLE|FILE.onnx", type=FOLDER)
@click.option("--rules-only", is_flag=True, help="Judge by the rules alone, without building or reading an engine.")
@json_option
def explain(source: Path, rules_only: bool, json_target: str | None) -> None:
    """Say which layers run in INT8 on TensorRT, how that is known, and what to change where one does not."""
    from faqd.deploy.explain.explain import explanation
    from faqd.deploy.explain.table import print_explanation

    record = explanation(source, rules_only=rules_only)
    if json_target != "-":
        print_explanation(record)
    emit_json(json_target, record)


@cli.command()
@click.argument("folder", metavar="RUN|BUNDLE", type=FOLDER)
@json_option
def inspect(folder: Path, json_target: str | None) -> None:
    """Say what a run or a bundle is, or the runs or bundles of a folder, as a table."""
    from faqd.deploy.inspect import inspect_folder
    from faqd.deploy.sweep import inspected

    facts, lines = inspected(folder) or inspect_folder(folder)
    if json_target != "-":
        click.echo("\n".join(lines))
    emit_json(json_target, facts)


@cli.command()
@click.argument("bundle_folder", metavar="BUNDLE", type=FOLDER)
@predict_flags
def predict(
    bundle_folder: Path, images: tuple[Path, ...], backend: Any, top: int, out: Path | None, json_target: str | None
) -> None:
    """Run the student of a bundle on pictures: classes and scores as lines, all outputs into a file.

    Pictures are decoded, resized and normalised as they were in training.
    """
    from faqd.deploy.predict import predict_pictures

    show = None if json_target == "-" else click.echo
    facts = predict_pictures(bundle_folder, images, backend, top, out, json_target is not None, show, _say)
    emit_json(json_target, facts)


@cli.command("build-engine")
@click.argument("bundle_folder", metavar="BUNDLE", type=FOLDER)
@built_flags
@shape_flags
@builder_flags
@engine_flags
@engine_output_flags
def build_engine(
    bundle_folder: Path,
    build_all: bool,
    force: bool,
    min_shapes: str | None,
    opt_shapes: str | None,
    max_shapes: str | None,
    out: Path | None,
    json_target: str | None,
    **options: Any,
) -> None:
    """Build the engine with the TensorRT or TensorRT-RTX installed here."""
    from faqd.bundle import load_bundle
    from faqd.deploy.engine.bundle_engines import build_bundle
    from faqd.deploy.engine.options import BuildOptions, shapes_from_text

    chosen = BuildOptions(
        min_shapes=shapes_from_text("--min-shapes", min_shapes),
        opt_shapes=shapes_from_text("--opt-shapes", opt_shapes),
        max_shapes=shapes_from_text("--max-shapes", max_shapes),
        **options,
    )
    records = build_bundle(load_bundle(bundle_folder), all=build_all, force=force, options=chosen, say=_say, out=out)
    emit_json(json_target, records)


@cli.command()
@click.argument("engine", required=False, type=FOLDER)
@json_option
def doctor(engine: Path | None, json_target: str | None) -> None:
    """Say whether this machine can run ENGINE and what to do if not; without ENGINE, what this machine has.

    Exit code 1 if it cannot, 2 if the engine has no record.
    """
    from faqd.deploy.board.doctor import examine, lines

    findings = examine(engine)
    if json_target != "-":
        click.echo("\n".join(lines(findings)))
    emit_json(json_target, [finding.to_json() for finding in findings])
    if failed := [finding.what for finding in findings if finding.status == "fails"]:
        raise UserError(f"{engine or 'engines'}: cannot run here ({', '.join(failed)}).", exit_code=1)


@cli.command()
@click.option("--cases", metavar="REGEX", help="Try only the cases whose name matches.")
@click.option(
    "--cuda",
    "backend",
    type=click.Choice(["auto", "cuda-bindings", "pycuda"]),
    default="auto",
    help="Run engines through this binding.",
)
@json_option
def selftest(cases: str | None, backend: str, json_target: str | None) -> None:
    """Try tiny networks on this machine: which are legal, run in INT8, and give the right numbers.

    Exit code 1 if one does not hold that faqd relies on. results/boards/README.md says how to send the JSON in.
    """
    from faqd.deploy.board.selftest import conclusion
    from faqd.deploy.board.selftest import selftest as selftested

    record = selftested(cases, backend, _say)
    emit_json(json_target, record)
    _say(conclusion(record))
    if record["summary"]["broken"]:
        raise UserError(f"not as faqd needs it: {', '.join(record['summary']['broken'])}", exit_code=1)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
