"""faqd: distil a float network into an integer one without labels, lower it exactly, and prove it."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("faqd")
except PackageNotFoundError:  # a plain checkout that was never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from faqd.deploy.bundle_facts import BundleOptions
    from faqd.deploy.lower import Lowered, lower
    from faqd.deploy.run_bundle import Engine
    from faqd.deploy.write_bundle import export
    from faqd.errors import UserError
    from faqd.quantize.calibrate import calibrate
    from faqd.quantize.config import QuantConfig
    from faqd.quantize.prepare import prepare
    from faqd.quantize.student import Student
    from faqd.train.losses.distillation import affinity_loss, logit_loss
    from faqd.train.losses.distillation_loss import DistillationLoss

_HOMES = {
    "BundleOptions": "faqd.deploy.bundle_facts",
    "DistillationLoss": "faqd.train.losses.distillation_loss",
    "Engine": "faqd.deploy.run_bundle",
    "Lowered": "faqd.deploy.lower",
    "QuantConfig": "faqd.quantize.config",
    "Student": "faqd.quantize.student",
    "UserError": "faqd.errors",
    "affinity_loss": "faqd.train.losses.distillation",
    "calibrate": "faqd.quantize.calibrate",
    "export": "faqd.deploy.write_bundle",
    "logit_loss": "faqd.train.losses.distillation",
    "lower": "faqd.deploy.lower",
    "prepare": "faqd.quantize.prepare",
}
"""Where each public name lies: torch and numpy are imported by who asks for one that needs them."""
__all__ = [
    "BundleOptions",
    "DistillationLoss",
    "Engine",
    "Lowered",
    "QuantConfig",
    "Student",
    "UserError",
    "__version__",
    "affinity_loss",
    "calibrate",
    "export",
    "logit_loss",
    "lower",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'faqd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
