"""What a command says of a bundle in the end, the proof apart from the fidelity, and with which exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from faqd.bundle import VERIFY, Bundle, floats_in_words
from faqd.command import emit_json
from faqd.deploy.sweep import bundle_row
from faqd.errors import UserError
from faqd.fidelity import advice, in_words
from faqd.files import read_json, write_json
from faqd.proof import codes_in_words
from faqd.sweep import table


def conclude(bundle: Bundle, json_target: str | None, min_fidelity: float | None) -> None:
    """The last lines of a command that has written a bundle, and its manifest as JSON. UserError (exit code 1) where it
    is not proved, or has kept less of the teacher than `min_fidelity`."""
    click.echo("\n".join(bundle_lines(bundle)), err=True)
    emit_json(json_target, bundle.manifest)
    exit_if_failed(read_json(bundle.folder / VERIFY), min_fidelity)


def bundle_lines(bundle: Bundle, advised: bool = True) -> Iterator[str]:
    """What stays float, the proof, the fidelity, and both in a word. advised: with what to try where something was
    lost."""
    record = read_json(bundle.folder / VERIFY)
    worst = min(record["fidelity"].values(), key=lambda each: float(each["least"]))
    yield from floats_in_words(bundle.manifest)
    if record["passed"]:
        yield f"proof: {codes_in_words(record)}."
    yield from fidelity_lines(bundle, record) if advised else in_words(record["fidelity"])
    yield f"{bundle.folder}: {bundle.name}, {_verdict(record)}; of its teacher: {worst['verdict']}."


def conclude_all(
    bundles: Sequence[Bundle], failed: Sequence[str], json_target: str | None, min_fidelity: float | None
) -> None:
    """The same for a folder of bundles: one table. failed: runs of which there is no bundle. UserError (exit code 1)
    names those, and the bundles that are not proved or have kept too little."""
    if bundles:
        click.echo("\n".join(table([bundle_row(bundle) for bundle in bundles])), err=json_target == "-")
    emit_json(json_target, [{"bundle": bundle.folder.name, **bundle.manifest} for bundle in bundles])
    complaints = [f"{name}: no bundle" for name in failed]
    for bundle in bundles:
        try:
            exit_if_failed(read_json(bundle.folder / VERIFY), min_fidelity)
        except UserError as error:
            complaints.append(f"{bundle.folder.name}: {error}")
    if complaints:
        raise UserError("\n".join(complaints), exit_code=1)


def keep(bundle: Bundle, record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write verify.json; of a bundle that cannot be written to, as in a read-only image, say so and go on: what was
    found holds."""
    path = bundle.folder / VERIFY
    try:
        write_json(path, record)
    except OSError as error:
        why = (error.strerror or type(error).__name__).lower()
        say(f"warning: {path} is as it was, it cannot be written ({why}); --json FILE keeps this result elsewhere.")


def fidelity_lines(bundle: Bundle, record: dict[str, Any]) -> Iterator[str]:
    yield from in_words(record["fidelity"])
    if any(each["verdict"] != "kept" for each in record["fidelity"].values()):
        yield advice(bundle.kind)


def _verdict(record: dict[str, Any]) -> str:
    failed = [flavour for flavour, result in record["flavours"].items() if not result["passed"]]
    if not failed:
        return "verified"
    passed = [flavour for flavour in record["flavours"] if flavour not in failed]
    return "NOT verified" + (f" for {', '.join(failed)}, but for {', '.join(passed)}" if passed else "")


def exit_if_failed(record: dict[str, Any], min_fidelity: float | None) -> None:
    if not record["passed"]:
        failures = record["failures"]
        more = f" (and {len(failures) - 1} more, see verify.json)" if len(failures) > 1 else ""
        raise UserError(f"verification failed: {failures[0]}{more}", exit_code=1)
    for file, found in record["fidelity"].items():
        if min_fidelity is not None and found["least"] < min_fidelity:
            raise UserError(
                f"{file}: fidelity {found['least']:.4f} is below --min-fidelity {min_fidelity:g}.", exit_code=1
            )
