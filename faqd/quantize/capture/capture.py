"""Capture of a user's network as a torch.fx graph in standard terms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from faqd.errors import UserError, first_line
from faqd.quantize.capture.program import in_standard_terms
from faqd.quantize.capture.standardize import standardise
from faqd.quantize.nodes import propagate
from faqd.quantize.outputs import INPUT, call_input, named_outputs


def capture(network: nn.Module, example: Tensor) -> fx.GraphModule:
    """Trace `network` in evaluation mode and propagate shapes with `example` (N, C, H, W).

    The graph has no in-place operators: a quantized tensor has several readers. Raises UserError naming the line of
    the user's code that cannot be captured, and where the graph computes something else than the network.
    """
    _refuse_scripts(network)
    network.eval()
    _refuse_training_mode(network)
    noise = torch.randn(example[:2].shape, generator=torch.Generator().manual_seed(0)).to(example)
    if not _equal(_outputs(network, noise), _outputs(network, noise)):
        raise UserError(
            f"{type(network).__name__}: returns something else each time for the same images: it draws random numbers "
            "in evaluation mode, as F.dropout without training=self.training or torch.rand do. Draw none there."
        )
    traced = in_standard_terms(network, example)
    propagate(traced, example)
    standardise(traced)
    propagate(traced, example)
    call_input(traced, getattr(network, "image_name", INPUT))
    for images in (noise, noise[:1]):  # a size that is one may choose another way through the network
        _refuse_another(network, traced, images)
    return traced


def _refuse_another(network: nn.Module, traced: fx.GraphModule, images: Tensor) -> None:
    found, wanted = _outputs(traced, images), _outputs(network, images)
    if _equal(found, wanted):
        return
    pairs = [(a, b) for a, b in zip(found, wanted, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    kinds = [f"{_kind(b)} and not {_kind(a)}" for a, b in pairs if a.dtype != b.dtype]
    cause = (
        f"it returns {kinds[0]}, as under autocast or from numbers of that type. Compute in float32 throughout."
        if kinds
        else "the usual cause is a way through it that depends on values or on the number of images."
    )
    raise UserError(f"{type(network).__name__}: the captured graph computes something else than its forward: {cause}")


def _refuse_training_mode(network: nn.Module) -> None:
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    still = [name for name, module in network.named_modules() if module.training and isinstance(module, kinds)]
    if still:
        raise UserError(
            f"{still[0]}: stays in training mode behind network.eval(), so that it computes something else there than "
            "deployed. A train() or eval() of yours that does not call that of nn.Module is the usual cause."
        )


def _refuse_scripts(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(
                f"{name or type(network).__name__}: a TorchScript module has no Python forward to capture. Build the "
                "network from its classes and give the weights of the script: torch.jit.load(...).state_dict()."
            )


def _equal(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(map(_close, found, wanted))


def _outputs(network: nn.Module, x: Tensor) -> list[Any]:
    """What `network` returns for a copy of `x`, tuples and dictionaries taken apart."""
    with torch.no_grad():
        try:
            return list(named_outputs(network(x.clone())).values())
        # Whatever the user's forward raises; SystemExit is what sys.exit does there.
        except (Exception, SystemExit) as error:
            cause = error.__cause__ or error
            raise UserError(
                f"the network does not accept one input of shape {tuple(x.shape)} and nothing else: "
                f"{first_line(cause) or type(cause).__name__}"
            ) from error


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(np.all(a == b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # In units of the largest: what is divided by a number is multiplied here, and sums may be ordered otherwise.
    largest = float(b.abs().max()) if b.numel() and b.is_floating_point() else 0.0
    return torch.allclose(
        a, b, rtol=1e-4, atol=1e-6 + 1e-5 * (largest if math.isfinite(largest) else 0.0), equal_nan=True
    )
