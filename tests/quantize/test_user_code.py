"""Networks as users write them: the forms of Python and of torch that stand around the operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.deploy.export.torch_to_onnx import onnx_from_deployed
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.torch_values import torch_digests
from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import collect_output_scales, convert
from tests.fixtures.networks import calibrated, float_file_db, images, lively

SHAPE = (3, 16, 16)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.last, self.rows = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.up, self.pool = nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(4)
        self.sized = nn.Upsample((16, 16))


class Optional(Base):
    def forward(
        self,
        x: Tensor,
        targets: Any = None,
        return_feature: bool = False,
        scale: float = 2.0,
        sizes: tuple[int, ...] = (1, 2),
        *,
        mode: str = "plain",
    ) -> Any:
        feature = self.last(self.first(x).relu()) * scale
        if targets is not None:
            return F.mse_loss(feature, targets)
        if return_feature or mode != "plain":
            return feature, x
        return feature.relu()


class NormAct(nn.BatchNorm2d):
    """A batch norm by function, of a class of its own, that calls its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(x)  # type: ignore[no-any-return]


class Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        size, stride = x.shape[-1], self.stride[0]
        more = max((-(-size // stride) - 1) * stride + self.kernel_size[0] - size, 0)
        x = F.pad(x, (more // 2, more - more // 2) * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Subclasses(Base):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.bn = Same(8, 8, 3, 2, bias=False), NormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(self.same(self.first(x).relu())))  # type: ignore[no-any-return]


class Remembers(Base):
    """Grids that are made again where the shape is another than before, as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: Any = None
        self.grid = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.first(x).relu())
        if self.shape != y.shape:
            self.shape = y.shape
            self.grid = torch.arange(y.shape[-1], device=x.device).type_as(y) + 0.5
        return y.sigmoid() + self.grid  # type: ignore[no-any-return]


class Variadic(Base):
    def both(self, *maps: Tensor) -> Tensor:
        out = maps[0]
        for each in maps[1:]:
            if each.shape[-1] != out.shape[-1]:
                each = F.interpolate(each, size=out.shape[-2:])
            out = out + each
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.both(*three_levels(self, x)))  # type: ignore[no-any-return]


def written_through_a_view(x: Tensor) -> Tensor:
    y = x.relu()
    y[:, :4].mul_(0.5)
    y[:, 4:6] = x[:, :2]
    return y


def without_either(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x.float().relu()
    with torch.no_grad():
        return y * 2


def three_levels(self: Base, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = self.first(x).relu()
    b = self.down(a).relu()
    return a, b, self.down(b).relu()


class Pyramid(Base):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = three_levels(self, x)
        return self.last(a + self.up(b + self.up(c)))  # type: ignore[no-any-return]


class PooledTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        a, b, _ = three_levels(self, x)
        return self.last(self.pool(a) + self.pool(b))  # type: ignore[no-any-return]


class EnlargedTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        _, b, c = three_levels(self, x)
        return self.last(self.sized(b) + self.sized(c))  # type: ignore[no-any-return]


class Heads(Base):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.rows(level.flatten(2).transpose(1, 2)) for level in three_levels(self, x)[:2]]


def form(operator: Callable[[Tensor], Any], inputs: int = 8) -> Callable[[], nn.Module]:
    class Form(Base):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(inputs, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(operator(self.first(x)))  # type: ignore[no-any-return]

    return Form


def joined(multiple: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return form(lambda x: torch.cat([x.relu(), multiple(x.relu())], 1), 16)


class ToldTwice(Base):
    """And both times another size than the convolution would give."""

    def __init__(self) -> None:
        super().__init__()
        self.wider = nn.ConvTranspose2d(8, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, b, c = three_levels(self, x)
        c = self.wider(c, output_size=b.shape[-2:]).relu()
        return self.last(self.wider(c, [15, 16]).relu())  # type: ignore[no-any-return]


class Coordinates(Base):
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1, 1, 16).expand(1, 2, 16, 16).clone())
        self.last = nn.Conv2d(10, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid.expand(x.shape[0], -1, -1, -1)
        return self.last(torch.cat([self.first(x).relu(), grid], 1))  # type: ignore[no-any-return]


class Frozen(Base):
    """A batch norm of buffers, as detectors have it."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        for index, name in enumerate(("weight", "bias", "mean", "var")):
            self.register_buffer(name, torch.linspace(0.5, 1.5 + index, 8))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.var + 1e-5).rsqrt()
        shift = self.bias - self.mean * scale
        y = self.first(x) * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return self.last(y.relu())  # type: ignore[no-any-return]


def behind(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3), *modules, nn.Conv2d(8, 4, 1))


def listed(x: Tensor) -> Tensor:
    pieces = list(x.relu().chunk(2, 1))
    pieces.extend(piece * 2 for piece in pieces[-1:])
    return torch.cat(pieces, 1)


class NormAndRelu(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def fused() -> nn.Module:
    """The way of detectors: another forward once the network is to be used."""
    network = form(lambda x: x.relu())()
    plain = network.forward
    network.forward = lambda x, scale=2.0: plain(x) * scale
    return network


def gated(expand: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return form(lambda x: x.relu() * expand(x.mean((2, 3), keepdim=True).sigmoid(), x))


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expand": lambda gate, x: gate.expand(-1, -1, x.shape[2], x.shape[3]),
    "expand to a shape": lambda gate, x: gate.expand(x.shape),
    "expand_as": lambda gate, x: gate.expand_as(x),
    "broadcast_to": lambda gate, x: torch.broadcast_to(gate, x.shape),
    "repeat": lambda gate, x: gate.repeat(1, 1, x.shape[2], x.shape[3]),
}


class Looked(nn.Module):
    """An offset for each channel, out of a table at places of another kind of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.table = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Embedding(5, 8)
        self.register_buffer("places", torch.tensor([4, 1, 2], dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.table(self.get_buffer("places").long()).mean(0).view(1, 8, 1, 1)
        return self.second(self.first(x).relu() + offset)  # type: ignore[no-any-return]


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "optional arguments": Optional,
    "one upsampling at two sizes": Pyramid,
    "one adaptive pooling at two sizes": PooledTwice,
    "one size for two maps": EnlargedTwice,
    "one linear head on two levels": Heads,
    "subclasses of torch's layers": Subclasses,
    "grids that are remembered": Remembers,
    "a function of any number of maps": Variadic,
    "written through a view": form(written_through_a_view),
    "in place before a shortcut": form(lambda x: F.relu(x, inplace=True) + x),
    "written over a copy": form(lambda x: x.clone().relu_() + x),
    "written over what dropout gave": form(lambda x: F.dropout(x, 0.5, False).clamp_(0, 4) + x),
    "a sum with nothing of the other": form(lambda x: torch.add(x.relu(), x, alpha=0)),
    "mean of a stack": form(lambda x: torch.stack([x.relu(), x, x.sigmoid()]).mean(0)),
    "shaped by isinstance": form(lambda x: x.relu() if isinstance(x, Tensor) else x),
    "under no_grad and autocast that is off": form(without_either),
    "whole limits": behind(nn.Hardtanh(0, 6)),
    "a norm of the user's own": behind(NormAndRelu(8)),
    "another forward": fused,
    "list of chunks": form(listed, 12),
    "pieces of sizes": form(lambda x: torch.cat([p.relu() for p in x.split([2, 6], 1)], 1)),
    "hardtanh_": form(lambda x: F.hardtanh_(x, 0.0, 3.0)),
    "leaky_relu_": form(lambda x: F.leaky_relu_(x, 0.2)),
    "clamp_min": form(lambda x: torch.clamp_min(x, 0)),
    "clamp_min method": form(lambda x: x.clamp_min(0)),
    "neg": form(lambda x: torch.neg(x).relu() + x.neg().relu()),
    "sigmoid_": form(lambda x: x.sigmoid_()),
    "sub_ and div_": form(lambda x: x.sub_(0.5).div_(2).relu()),
    "torch.max_pool2d": form(lambda x: torch.max_pool2d(x.relu(), 2)),
    "to": form(lambda x: x.to(torch.float32).relu()),
    "constant padding": behind(nn.ReLU(), nn.ConstantPad2d(1, 0.0)),
    "alpha dropout": behind(nn.ReLU(), nn.FeatureAlphaDropout(), nn.AlphaDropout()),
    "synchronised norm": behind(nn.SyncBatchNorm(8), nn.ReLU()),
    "one transposed convolution told two sizes": ToldTwice,
    "windows beyond one axis alone": form(lambda x: F.max_pool2d(x[..., :13].relu(), 2, 4, ceil_mode=True)),
    "cropped and padded": form(lambda x: F.pad(x.relu(), (1, -3, -2, 2), "reflect")),
    "coordinates": Coordinates,
    "frozen norm": Frozen,
    "sum with a factor": form(lambda x: torch.add(x, x.relu(), alpha=0.5).sub(x.relu(), alpha=2)),
    "words for sums and products": form(
        lambda x: torch.subtract(torch.multiply(x.relu(), 0.3).divide(0.7), torch.negative(x)).true_divide(2)
    ),
    "turned subtraction": form(lambda x: torch.rsub(x, 1.5).relu()),
    "product and sum in one": form(lambda x: torch.addcmul(x, x.relu(), torch.sigmoid(x), value=0.5)),
    "quotient and sum in one": form(lambda x: torch.addcdiv(torch.ones(1, 8, 1, 1), x, torch.full((8, 1, 1), 3.0))),
    "square": form(lambda x: x.relu().square() + torch.square(x)),
    "positive and swapped": form(lambda x: torch.positive(x.relu()).swapaxes(2, 3)),
    "concatenate": form(lambda x: torch.concatenate([x.relu()[:, :4], x.sigmoid()[:, 4:]], dim=1)),
    "lerp meets its ends": form(
        lambda x: torch.cat([torch.lerp(x.relu(), F.max_pool2d(x.relu(), 3, 1, 1), w) for w in (0.5, 0.25)], 1), 16
    ),
    "lerp by a map": form(lambda x: x.relu().lerp(x.sigmoid(), torch.sigmoid(x))),
    "by keywords": form(
        lambda x: torch.mul(other=torch.add(other=x, input=x.relu()), input=torch.div(input=x, other=3.0))
    ),
    **{f"gate by {how}": gated(expand) for how, expand in GATES.items()},
    "of its own type": form(lambda x: x.relu().type_as(x).cpu().float()),
    "len for the batch": form(lambda x: torch.cat([x.relu(), torch.ones(1, 2, 16, 16).repeat(len(x), 1, 1, 1)], 1), 10),
    "len of a list of chunks": form(lambda x: torch.cat([p * len(x.chunk(2, 1)) for p in x.chunk(2, 1)], 1)),
    "a test on sizes": form(lambda x: x.relu() if x.shape[2] == 16 else x),
    "an average by a divisor": form(lambda x: F.avg_pool2d(x.relu(), 3, 2, 1, False, False, 4)),
    "half by a kernel meets whole": joined(lambda x: F.conv2d(x, torch.full((8, 1, 1, 1), 0.5), groups=8)),
    "half by a dense kernel meets whole": joined(lambda x: F.conv2d(x, 0.5 * torch.eye(8).view(8, 8, 1, 1))),
    "integers of its own joined": form(
        lambda x: torch.cat([x.relu(), torch.arange(2).view(1, 2, 1, 1).expand(len(x), 2, 16, 16)], 1), 10
    ),
    "a blur meets whole": joined(
        lambda x: F.conv2d(
            x, torch.tensor([1.0, 2.0, 1.0]).outer(torch.ones(3)).expand(8, 1, 3, 3) / 12, None, 1, 1, 1, 8
        )
    ),
    "integers of its own": form(lambda x: (x * 255 - torch.arange(8).view(8, 1, 1)) / torch.tensor([[[58]]])),
    "a table read at its own places": Looked,
    "a mask of its own": form(lambda x: x.relu() * (torch.arange(8) % 3 > 0).view(1, 8, 1, 1)),
    "a mask over images": form(lambda x: x.relu() * (torch.arange(16) % 3 > 0).expand(len(x), 8, 16, 16)),
    "half meets whole": joined(lambda x: x * 0.5),
    "mean of two meets one": joined(lambda x: (x + F.max_pool2d(x, 3, 1, 1)) / 2),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_is_taken_as_it_stands(kind: str) -> None:
    x = images(3, 8, SHAPE)
    student = calibrated(lively(TAKEN[kind](), 1), QuantConfig(8, 8), shape=SHAPE)
    scales = collect_output_scales(student, [images(0, 16, SHAPE)])
    for flavour in ("tensorrt", "onnxruntime"):
        deployed = convert(student, flavour, scales)
        model = onnx_from_deployed(deployed, x, {})
        assert len(model.graph.input) == 1
        modes = [False, True] if flavour == "onnxruntime" else [False]
        assert verify_file(model, x.numpy(), torch_digests(deployed, x), modes)["failures"] == []
    unquantized = onnx_from_deployed(convert(student, "float"), x, {}).SerializeToString()
    assert min(float_file_db(unquantized, student, x).values()) > 100


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "script": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())), "a TorchScript module"),
    "mean of everything": (form(lambda x: x - x.mean()), r"mean \(.*test_user_code.py:\d+\): .* mixes images"),
    "mean over the batch": (form(lambda x: x - x.mean(0, keepdim=True)), "mixes images"),
    "list of places": (form(lambda x: x.relu()[:, [1, 0, 3, 2, 5, 4, 7, 6]]), "indexing with a list of positions"),
    "divisor": (form(lambda x: F.avg_pool2d(x.relu(), 3, 2, 0, True, True, 3)), "divisor_override with ceil_mode"),
    "random numbers": (form(lambda x: x + torch.rand(1, 8, 16, 16)), "draws random numbers in evaluation mode"),
    "random numbers of its size": (form(lambda x: x + torch.randn_like(x)), "draws random numbers in evaluation mode"),
    "half in the middle": (form(lambda x: (x.relu().half() * 2).float()), "another type of numbers in the middle"),
    "dropout that stays on": (form(lambda x: F.dropout(x, 0.5)), "draws random numbers in evaluation mode"),
    "no function of tensors": (form(lambda x: x + int(x[0, 0, 0, 0] * 0)), "control flow that depends on values"),
    "a way that values choose": (
        form(lambda x: torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,))),
        "cond chooses what to compute by values",
    ),
    "divided by zero": (form(lambda x: torch.nan_to_num(x / 0)), "truediv cannot be quantized yet"),
    "a test on values": (form(lambda x: x if x.sum() > 0 else x.relu()), "asks for values of a tensor"),
    "a test on how many images": (form(lambda x: x if x.shape[0] > 1 else x.relu()), "or on the number of images"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_is_refused_in_a_sentence(kind: str) -> None:
    make, words = REFUSED[kind]
    with pytest.raises(UserError, match=words):
        calibrated(make(), QuantConfig(8, 8, strict=True), shape=SHAPE)


def test_a_network_of_two_inputs_is_refused() -> None:
    class Two(Base):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.first(x) + y  # type: ignore[no-any-return]

    with pytest.raises(UserError, match=r"one input of shape .* and nothing else: .*'y'"):
        capture(Two(), torch.zeros(2, *SHAPE))


def test_a_path_that_other_sizes_would_take_is_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(1, 3, 8, 8)

    with pytest.raises(UserError, match="does not accept one input of shape"):
        capture(Fixed(), torch.zeros(2, *SHAPE))
