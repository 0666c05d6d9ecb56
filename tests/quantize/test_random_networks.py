"""Two hundred random networks a run: torch, the reference and onnxruntime must agree on every one of them.

An export by torch costs a second before the first operator, so networks are exported side by side, as outputs of one
file. A network that fails is exported alone, then with fewer units, until the smallest that fails is left.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch

from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import torch_codes, torch_digests
from faqd.quantize.convert import Deployed
from faqd.quantize.operators.requantize import Flavour
from tests.fixtures.networks import images
from tests.fixtures.random_networks import random_deployed, random_size, side_by_side

NETWORKS = int(os.environ.get("FAQD_RANDOM_NETWORKS", "200"))
TOGETHER = 10
MOST_TRIVIAL = 0.35
"""Largest share of drawn networks that may be passed over because random weights made them nearly constant."""


def is_trivial(deployed: Deployed, seed: int) -> bool:
    """Fewer than five classes predicted, or less than 1 % of codes at the lower or the upper clip."""
    x = images(seed + 1, 64, reach=3.0)
    grids = {name.removesuffix("_quant"): module.quant for name, module in deployed.requantizers().items()}
    codes = torch_codes(deployed, x)
    low = np.concatenate([(codes[name] == quant.low).ravel() for name, quant in grids.items()])
    high = np.concatenate([(codes[name] == quant.high).ravel() for name, quant in grids.items()])
    return len(set(deployed(x).argmax(1).tolist())) < 5 or low.mean() < 0.01 or high.mean() < 0.01


def failures(networks: dict[int, Deployed], batch: int) -> dict[int, str]:
    """The first failure of each network that fails, by its seed."""
    together = side_by_side({f"n{seed}": deployed for seed, deployed in networks.items()})
    x = images(7, batch, reach=3.0)
    model = onnx_from_deployed(together, images(1, 2), {})
    modes = [False, True] if together.flavour == "onnxruntime" else [False]
    found = verify_file(model, x.numpy(), torch_digests(together, x, driven=batch // 2), modes)["failures"]
    by_seed: dict[int, str] = {}
    for text in found:
        prefix = text.partition(".")[0].removeprefix("n")
        by_seed.setdefault(int(prefix) if prefix.isdecimal() else -1, text)
    return by_seed


def smallest_failure(seed: int, flavour: Flavour, batch: int, first: str) -> str:
    for size in range(random_size(seed) + 1):
        found = failures({seed: random_deployed(seed, size, flavour)}, batch)
        if found:
            return f"RandomNetwork({seed}, {size}), {flavour}, batch {batch}: {found}"
    return f"random network {seed}, {flavour}, batch {batch}, fails only beside others: {first}"


def check_group(first_seed: int, flavour: Flavour, count: int) -> tuple[list[str], int]:
    """Check `count` networks that are not trivial; returns the failures and the number of networks drawn."""
    torch.set_num_threads(1)
    networks: dict[int, Deployed] = {}
    seed = first_seed
    while len(networks) < count:
        deployed = random_deployed(seed, random_size(seed), flavour)
        if not is_trivial(deployed, seed):
            networks[seed] = deployed
        seed += 1
    batch = random.Random(first_seed).choice([1, 2, 3, 8, 17])
    found = failures(networks, batch)
    return [
        smallest_failure(s, flavour, batch, found[s]) if s in networks else found[s] for s in found
    ], seed - first_seed


def test_random_networks_are_lowered_exactly() -> None:
    flavours: tuple[Flavour, Flavour] = ("tensorrt", "onnxruntime")
    groups = [(1000 * index, flavours[index % 2], TOGETHER) for index in range(-(-NETWORKS // TOGETHER))]
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(check_group, *zip(*groups, strict=True)))
    assert [text for found, _ in results for text in found] == []
    assert sum(drawn for _, drawn in results) * (1 - MOST_TRIVIAL) <= len(groups) * TOGETHER
