"""What torch.compile does to the teacher and to the student of a small network: seconds to compile, and then.

`python -m faqd.benchmarks.studies.compiled --json FILE` times the teacher's pass, and the student's forward and
backward pass with its weight projections, as torch runs them and as its compiler does, in turn; and compares what they
compute.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor, nn

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.calm_weights import enliven, settle
from faqd.command import emit_json, json_option, run
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused, in_place
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.networks.zoo import build_architecture

VERSION = 1
BITS, CLASSES = 4, 10

Work = Callable[[], list[Tensor]]


def teacher_of(network: nn.Module, x: Tensor) -> nn.Module:
    """As training runs it: batch norm folded, channels last."""
    tapped = in_place(fused(capture(network, x[:2]))).eval()
    return tapped.to(memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]


def student_of(network: nn.Module, x: Tensor) -> nn.Module:
    student = insert_quantizers(capture(network, x[:2]), QuantConfig(BITS, BITS), x[:2])
    calibrate(student, [x], "max")
    student.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    student.network.train()
    for module in student.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return student.network


def forward_of(network: Callable[[Tensor], Tensor], x: Tensor) -> Work:
    def work() -> list[Tensor]:
        with torch.no_grad():
            return [network(x)]

    return work


def step_of(network: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> Work:
    def work() -> list[Tensor]:
        output = network(x)
        return [output.detach(), *torch.autograd.grad(output.square().mean(), parameters, allow_unused=False)]

    return work


def compared(network: nn.Module, plain: Work, compiled: Work, times: int) -> dict[str, Any]:
    """Seconds until the compiled one first answers, medians in turn, and how far apart are the output, and all that
    each gives, relative to its length."""
    plain()
    began = time.perf_counter()
    compiled()
    first = time.perf_counter() - began
    seconds: dict[str, list[float]] = {"plain_s": [], "compiled_s": []}
    for _ in range(times):
        for name, work in (("plain_s", plain), ("compiled_s", compiled)):
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    # Each call moves the scales of weights a little; both begin from the same.
    start = {name: value.clone() for name, value in network.state_dict().items()}
    found = []
    for work in (plain, compiled):
        network.load_state_dict(start)
        found.append(work())
    pairs = list(zip(*found, strict=True))
    (output, other), *_ = pairs
    ours, theirs = (torch.cat([value.flatten() for value in values]) for values in found)
    return {
        "compile_s": round(first, 2),
        **{name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "least": {name: round(min(values), 5) for name, values in seconds.items()},
        "same_bits": all(a.equal(b) for a, b in pairs),
        "output_apart": float((output - other).norm() / output.norm()),
        "all_apart": float((ours - theirs).norm() / ours.norm()),
    }


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
@click.option("--network", default="resnet20", show_default=True, help="Take this one of the zoo.")
@click.option("--pixels", default=32, show_default=True, type=click.IntRange(8), help="At this size.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(2), help="So many images at once.")
@click.option("--times", default=15, show_default=True, type=click.IntRange(2), help="How often each is timed.")
def command(json_target: str | None, network: str, pixels: int, batch: int, times: int) -> None:
    # Read when the compiler is loaded: nothing of an earlier run is taken.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch.manual_seed(0)
    x = torch.randn(batch, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    plain = build_architecture(network, 3, CLASSES, pixels).eval()
    enliven(plain)
    settle(plain, x)
    teacher, student = teacher_of(plain, x), student_of(plain, x)
    learned = [parameter for parameter in student.parameters() if parameter.requires_grad]
    works = {
        "teacher": (teacher, forward_of(teacher, x), forward_of(torch.compile(teacher), x)),
        "student": (student, step_of(student, learned, x), step_of(torch.compile(student), learned, x)),
    }
    rows = {name: compared(*work, times) for name, work in works.items()}
    for name, row in rows.items():
        click.echo(f"{name}: {row}", err=True)
    result = {
        "version": VERSION,
        "what": "teacher forward, student forward and backward: as torch runs them, and compiled by torch.compile",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.compiled", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "network": network,
        "pixels": pixels,
        "batch": batch,
        "times": times,
        "rows": rows,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
