"""One public network all the way: capture, 8/8 without training, a proved bundle, an engine, and what each step took.

`python -m faqd.benchmarks.studies.coverage_network NAME --json -`; coverage.py does so for all of them, each in a
process of its own.
"""

from __future__ import annotations

import re
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, fx

import faqd
from faqd import bundle as names
from faqd.benchmarks.studies.calm_weights import pictures
from faqd.benchmarks.studies.public_networks import Public, build, public_networks
from faqd.benchmarks.studies.resumable import say
from faqd.bundle import Bundle
from faqd.command import emit_json, json_option, run
from faqd.deploy.bundle_facts import BundleOptions
from faqd.deploy.engine.bundle_engines import build_bundle
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.verify.outputs import snr_db
from faqd.errors import UserError, first_line
from faqd.files import read_json
from faqd.preprocess import Preprocess
from faqd.quantize import nodes
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.int8_share import int8_share
from faqd.quantize.outputs import run_batches
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student

STAGES = ("capture", "prepare", "calibrate", "bundle", "engine")
"""What a network goes through, in order; `reached` names the last that ended well."""
CALIBRATION, JUDGED = 16, 8
"""Images."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def tried(network: Public, *, engine: bool) -> dict[str, Any]:
    """What became of it: the stage `reached`, and the `sentence` or `traceback` that ended it there.

    snr_db: of the student to the float network over images that nothing was calibrated on, the least of its outputs;
    plain_db: the same for plain rounding in front of every layer. seconds, peak_mib: by stage, the latter of the whole
    process until then.
    """
    preprocess = Preprocess(network.side, network.side, MEAN, STD)
    pixels = pictures(network.side, CALIBRATION + JUDGED, seed=0)
    x = torch.from_numpy(preprocess.normalise(pixels))
    made = build(network, x[:8])
    record: dict[str, Any] = {"kind": network.kind, "side": network.side, "reached": "", "seconds": {}, "peak_mib": {}}
    try:
        student = _prepared(made, x, record)
        record |= _facts(student) | _distances(student, x)
        with tempfile.TemporaryDirectory() as folder:
            with _stage(record, "bundle"):
                bundle = faqd.export(
                    student, Path(folder) / "bundle", x, mean=MEAN, std=STD, options=BundleOptions(eval_samples=JUDGED)
                )
            record["float_type"] = bundle.manifest["float_type"]
            record["proved"] = _proved(bundle)
            if engine:
                record |= _engine(bundle, record)
    except UserError as error:
        record["sentence"] = re.sub(r"^\S*/bundle: ", "", str(error))
    except Exception as error:  # what nobody thought of is what this looks for
        record["sentence"] = f"{type(error).__name__}: {first_line(error)}"
        record["traceback"] = traceback.format_exc().splitlines()[-12:]
    return record


def _prepared(made: torch.nn.Module, x: Tensor, record: dict[str, Any]) -> Student:
    example = x[:2]
    with _stage(record, "capture"):
        captured = capture(made, example)
    with _stage(record, "prepare"):
        student = insert_quantizers(captured, faqd.QuantConfig(), example)
        student.eval()
    with _stage(record, "calibrate"):
        faqd.calibrate(student, x[:CALIBRATION])
    return student


def _engine(bundle: Bundle, record: dict[str, Any]) -> dict[str, Any]:
    with _stage(record, "engine"):
        (built,) = build_bundle(bundle, all=False, force=False, options=BuildOptions(), say=lambda _: None)
    found = built["int8"]
    return {"engine": {"int8": found["built"], "expected": found["expected"]}, "builder": built["builder"]}


def _facts(student: Student) -> dict[str, Any]:
    layers = [node for node in student.network.graph.nodes if nodes.role(student.network, node) == "compute"]
    return {
        "layers": len(layers),
        "islands": len(student.islands),
        "operators_in_islands": sum(len(island.operators) for island in student.islands),
        "int8_share": round(int8_share(student), 4),
    }


def _proved(bundle: Bundle) -> dict[str, bool]:
    """By flavour, whether its file passed."""
    flavours = read_json(bundle.folder / names.VERIFY)["flavours"]
    return {name: bool(found["passed"]) for name, found in flavours.items()}


# Error to the float network ------------------------------------------------------------------------------------------


def _distances(student: Student, x: Tensor) -> dict[str, float | None]:
    judged = x[CALIBRATION:]
    network = fused(student.float_network)
    wanted = run_batches(network, judged, 2)
    rounding = _PlainRounding(network)
    rounding.measure(x[:CALIBRATION])
    return {"snr_db": _least(student, judged, wanted), "plain_db": _least(rounding.run, judged, wanted)}


def _least(network: Callable[[Tensor], Any], x: Tensor, wanted: dict[str, Tensor]) -> float | None:
    """Of the outputs that are no integers, the signal-to-noise ratio of the worst; None where none differs."""
    found = run_batches(network, x, 2)
    ratios = [snr_db(found[name].numpy(), value.numpy()) for name, value in wanted.items()]
    return min((round(ratio, 2) for ratio in ratios if ratio is not None), default=None)


class _PlainRounding(fx.Interpreter):
    """What anybody does: the input of every layer to signed 8 bits by its largest value, and its weights by channel."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network)
        self.network = network
        self.largest: dict[str, float] = {}
        self._measures = False

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        self._measures = True
        for some in x.split(2):
            self.run(some)
        self._measures = False

    def run_node(self, n: fx.Node) -> Any:
        layer: Any = nodes.module_of(self.network, n) if nodes.role(self.network, n) == "compute" else None
        if layer is None:
            return super().run_node(n)
        read = nodes.operand(n)
        x = self.env[read]
        if self._measures:
            self.largest[n.name] = max(float(x.abs().max()), self.largest.get(n.name, 0.0))
            return super().run_node(n)
        weight: Tensor = layer.weight
        kept = weight.data
        axes = [axis for axis in range(weight.dim()) if axis != getattr(layer, "transposed", False)]
        try:
            weight.data = _rounded(kept, kept.abs().amax(axes, keepdim=True) / 127)
            self.env[read] = _rounded(x, torch.tensor(self.largest[n.name] / 127))
            return super().run_node(n)
        finally:
            weight.data, self.env[read] = kept, x


def _rounded(x: Tensor, step: Tensor) -> Tensor:
    return (x / step.clamp_min(1e-30)).round() * step


@contextmanager
def _stage(record: dict[str, Any], name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
        record["reached"] = name
    finally:
        record["seconds"][name] = round(time.perf_counter() - started, 2)
        record["peak_mib"][name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("name")
@click.option("--engine", is_flag=True, help="Build TensorRT's engine too.")
@json_option
def command(name: str, engine: bool, json_target: str | None) -> None:
    known = public_networks()
    if name not in known:
        raise UserError(f"{name}: none of the {len(known)} networks of public_networks.py.")
    record = tried(known[name], engine=engine)
    say(f"{name}: {record['reached'] or 'nothing'} reached. {record.get('sentence', '')}")
    emit_json(json_target, record)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
