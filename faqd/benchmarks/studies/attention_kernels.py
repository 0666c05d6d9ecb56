"""Which kernels TensorRT-RTX builds for attention on codes and on floats, by the number of tokens; no GPU is needed.

`python -m faqd.benchmarks.studies.attention_kernels --json FILE`: one block of a vision transformer with random
weights, two heads of 64 channels.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import faqd
from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.calm_weights import pictures
from faqd.benchmarks.studies.resumable import say
from faqd.command import emit_json, json_option, run
from faqd.deploy.bundle_facts import BundleOptions
from faqd.deploy.engine.bundle_engines import build_bundle
from faqd.deploy.engine.options import BuildOptions
from faqd.quantize.config import Attention

VERSION = 1
SIDES = (16, 22, 23)
"""Of the image in patches of 4 x 4 pixels: 257, 485, 530 tokens."""
WIDTH, HEADS, PATCH = 128, 2, 4
ATTENTIONS: tuple[Attention, ...] = ("float", "int8")
_OF_ATTENTION = re.compile("mha|attention|softmax", re.IGNORECASE)


class _Block(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, WIDTH, PATCH, PATCH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.token, self.places = (nn.Parameter(torch.randn(1, count, WIDTH)) for count in (1, tokens))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.places
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        found: Tensor = self.head(x.mean(1))
        return found


def kernels(side: int, attention: Attention) -> list[dict[str, Any]]:
    """Of the two products and the softmax between them: name, and the types of what each kernel reads and writes."""
    torch.manual_seed(0)
    x = torch.from_numpy(pictures(PATCH * side, 4, seed=0)).movedim(-1, 1).float().div(255)
    student = faqd.prepare(_Block(side**2 + 1).eval(), x[:2], faqd.QuantConfig(attention=attention))
    faqd.calibrate(student, x)
    with tempfile.TemporaryDirectory() as folder:
        bundle = faqd.export(student, Path(folder) / "bundle", x, options=BundleOptions(eval_samples=2))
        (built,) = build_bundle(bundle, all=False, force=False, options=BuildOptions(), say=lambda _: None)
    layers = [layer for layer in built["layers"] if _OF_ATTENTION.search(layer["name"])]
    return [{key: layer[key] for key in ("name", "type", "inputs", "outputs")} for layer in layers]


@click.command(help=(__doc__ or "").splitlines()[0])
@json_option
def command(json_target: str | None) -> None:
    rows = []
    for side in SIDES:
        for attention in ATTENTIONS:
            rows.append({"tokens": side**2 + 1, "attention": attention, "kernels": kernels(side, attention)})
            say(f"{rows[-1]}")
    result = {
        "version": VERSION,
        "what": f"kernels of one attention, {HEADS} heads of {WIDTH // HEADS} channels",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.attention_kernels", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__},
        "rows": rows,
    }
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
