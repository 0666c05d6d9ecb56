"""Networks that others published, by name; `results/coverage/` has their packages."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.benchmarks.studies.calm_weights import enliven, settle
from faqd.errors import UserError

CLASSES = 10


@dataclass(frozen=True)
class Public:
    """kind: cnn, mobile, hybrid, transformer, segmentation, detector, face or yolo. side: of the image, in pixels."""

    name: str
    kind: str
    side: int
    make: Callable[[], nn.Module]


def build(network: Public, images: Tensor) -> nn.Module:
    """The network in evaluation mode, calm on images (N, 3, H, W)."""
    torch.manual_seed(0)
    made = network.make().float().eval()
    if not network.name.startswith("facenet/mtcnn"):  # these come trained
        enliven(made)
        settle(made, images)
    return made


# Builders -----------------------------------------------------------------------------------------------------------


def _package(name: str) -> Any:
    # What these packages would otherwise write into the user's folders, or fetch.
    for variable, value in (
        ("YOLO_CONFIG_DIR", str(Path(tempfile.gettempdir()) / "faqd-ultralytics")),
        ("YOLO_OFFLINE", "True"),
        ("YOLO_AUTOINSTALL", "False"),
        ("YOLO_VERBOSE", "False"),
        ("HF_HUB_OFFLINE", "1"),
    ):
        os.environ.setdefault(variable, value)
    if name != "facenet_pytorch":
        _declare_torchvision()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed ({error}); results/coverage/requirements.txt has what is.") from error


def _declare_torchvision() -> None:
    """torchvision's compiled operators load with one build of torch alone. None of these networks calls them, but its
    Python declares fake ones, for which they have to have names."""
    if not hasattr(torch.ops.torchvision, "nms"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: _package("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(_package("torchvision.models"), name)(weights=None, num_classes=CLASSES, **options)


def _torchvision_segmenter(name: str) -> Callable[[], nn.Module]:
    part = "torchvision.models.segmentation"
    return lambda: getattr(_package(part), name)(weights=None, weights_backbone=None, num_classes=CLASSES)


class _Maps(nn.Module):
    """A detector without its transform, anchors and suppression, which are the application's."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def _torchvision_detector(name: str) -> Callable[[], nn.Module]:
    part = "torchvision.models.detection"
    return lambda: _Maps(getattr(_package(part), name)(weights=None, weights_backbone=None, num_classes=CLASSES))


def _smp(architecture: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        home = _package("segmentation_models_pytorch")
        made: nn.Module = getattr(home, architecture)(encoder_name=encoder, encoder_weights=None, classes=3)
        return made

    return make


def _facenet() -> nn.Module:
    made: nn.Module = _package("facenet_pytorch").InceptionResnetV1(pretrained=None, classify=False)
    return made


def _mtcnn(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(_package("facenet_pytorch.models.mtcnn"), name)(pretrained=True)


class _BeforeDecoding(nn.Module):
    """A YOLO up to the last convolutions of its head: raw maps."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers, self.kept = model.model, set(model.save)

    def forward(self, x: Tensor) -> list[Tensor]:
        made: list[Any] = []
        *body, head = self.layers
        for layer in body:
            x = layer(_read_by(layer, x, made))
            made.append(x if layer.i in self.kept else None)
        one_to_one = getattr(head, "end2end", False)
        parts = (head.one2one_cv2, head.one2one_cv3) if one_to_one else (head.cv2, head.cv3)
        levels = [x if source == -1 else made[source] for source in head.f]
        return [part[place](level) for place, level in enumerate(levels) for part in parts]


def _read_by(layer: Any, x: Tensor, made: list[Any]) -> Any:
    if layer.f == -1:
        return x
    return made[layer.f] if isinstance(layer.f, int) else [x if source == -1 else made[source] for source in layer.f]


def _yolo(name: str, form: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: Any = _package("ultralytics").YOLO(f"{name}.yaml").model.float().eval()
        for module in model.modules():
            if form == "export" and hasattr(module, "export"):
                module.export, module.format = True, "onnx"
        return _BeforeDecoding(model) if form == "maps" else model

    return make


# The list -----------------------------------------------------------------------------------------------------------

_TIMM = {
    ("cnn", 64): """resnet18 resnet50 resnext50_32x4d wide_resnet50_2 seresnet50 ecaresnet26t resnetblur50 resnetaa50
        resnetrs50 resnest14d res2net50_14w_8s res2next50 regnety_002 regnetz_b16 hrnet_w18_small dla46x_c
        ese_vovnet19b_dw cspresnet50 cs3darknet_s cs3darknet_focus_s darknet53 dpn48b dpn68 xception41 densenet121
        densenetblur121d nf_regnet_b0 eca_nfnet_l0 resnetv2_50x1_bit resnetv2_50 rexnetr_100 selecsls42b skresnet18
        hgnetv2_b0 rdnet_tiny gcresnext26ts repvgg_a0 convnext_atto convnext_zepto_rms inception_next_atto
        convmixer_768_32 mambaout_femto focalnet_tiny_srf edgenext_xx_small vovnet39a gernet_s""",
    ("cnn", 96): "inception_v3 inception_v4 inception_resnet_v2 nasnetalarge pnasnet5large legacy_xception",
    ("mobile", 64): """efficientnet_b0 efficientnet_lite0 tf_efficientnet_b0 tf_efficientnetv2_b0 efficientnetv2_rw_t
        efficientnet_es efficientnet_cc_b0_4e mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100
        mobilenetv3_large_100 mobilenetv4_conv_small ghostnet_100 ghostnetv2_100 ghostnetv3_100 mnasnet_100
        semnasnet_100 spnasnet_100 mixnet_s fbnetc_100 fbnetv3_b mobileone_s0 repghostnet_050 hardcorenas_a lcnet_050
        tinynet_e""",
    ("hybrid", 64): """mobilenetv4_hybrid_medium fastvit_sa12 repvit_m0_9 lambda_resnet26t mobilevitv2_050
        mobilevit_xxs poolformer_s12 convformer_s18 caformer_s18 shvit_s1 csatv2 nextvit_small iformer_t
        efficientvim_m1 swiftformer_xs""",
    ("transformer", 64): "pvt_v2_b0 davit_tiny",
    ("hybrid", 224): "levit_128s levit_conv_128s tiny_vit_5m_224 efficientformer_l1",
    ("hybrid", 256): "botnet26t_256 halonet26t",
    ("transformer", 240): "crossvit_tiny_240",
}
_TIMM_OF_ANY_SIDE = {
    "transformer": """resmlp_12_224 gmlp_ti16_224 mixer_s32_224 vit_tiny_patch16_224 deit3_small_patch16_224
        beit_base_patch16_224 eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
        coat_lite_tiny cait_xxs24_224 xcit_nano_12_p16_224 gcvit_xxtiny pit_ti_224 twins_svt_small hiera_tiny_224""",
    "hybrid": """coatnet_nano_rw_224 maxvit_pico_rw_256 efficientformerv2_s0 visformer_tiny vit_base_mci_224""",
}
_WITHOUT_SIDE = ("pit_ti_224", "twins_svt_small")
"""These take no `img_size`, but any image of a side that their patches divide."""
_SMP = """Unet-resnet18 Unet-mobilenet_v2 Unet-tu-mobilenetv3_small_100 Unet-tu-efficientnet_lite0
    UnetPlusPlus-resnet18 FPN-resnet18 DeepLabV3-resnet18 DeepLabV3Plus-mobilenet_v2 PAN-resnet18 PSPNet-resnet18
    Linknet-mobilenet_v2 MAnet-resnet18 UPerNet-resnet18 Segformer-mit_b0"""
_YOLOS = {
    "plain export maps": "yolov8n yolo11n yolo26n yolov5n yolov9t yolov3-tiny",
    "export": """yolo12n yolov10n yolov6n yolo11n-seg yolo11n-pose yolo11n-obb yolov8n-seg yolov8n-pose yolo26n-seg
        yolo11n-cls yolov8n-cls yolo26n-cls""",
    "plain": "yolo11n-seg yolo11n-cls",
    "maps": "yolov8n-ghost",
}


def public_networks() -> dict[str, Public]:
    """All of them by name; nothing is imported or built before `make` is called."""
    found: list[Public] = []

    def add(name: str, kind: str, side: int, make: Callable[[], nn.Module]) -> None:
        found.append(Public(name, kind, side, make))

    for (kind, side), names in _TIMM.items():
        for name in names.split():
            add(f"timm/{name}", kind, side, _timm(name))
    for kind, names in _TIMM_OF_ANY_SIDE.items():
        for name in names.split():
            side = 224 if name in _WITHOUT_SIDE or name.startswith("hiera") or "patch14" in name else 64
            add(f"timm/{name}", kind, side, _timm(name, **({} if side == 224 else {"img_size": side})))
    for name, kind, side, options in (
        ("mobilenet_v2", "mobile", 64, {}),
        ("mobilenet_v3_small", "mobile", 64, {}),
        ("efficientnet_v2_s", "mobile", 64, {}),
        ("mnasnet0_5", "mobile", 64, {}),
        ("squeezenet1_1", "mobile", 64, {}),
        ("shufflenet_v2_x0_5", "mobile", 64, {}),
        ("googlenet", "cnn", 64, {"init_weights": False}),
        ("inception_v3", "cnn", 96, {"init_weights": False}),
        ("convnext_tiny", "cnn", 64, {}),
        ("vgg11_bn", "cnn", 64, {}),
    ):
        add(f"torchvision/{name}", kind, side, _torchvision(name, **options))
    for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        add(f"torchvision/{name}", "segmentation", 64, _torchvision_segmenter(name))
    for name, side in (
        ("ssdlite320_mobilenet_v3_large", 320),
        ("retinanet_resnet50_fpn_v2", 64),
        ("fcos_resnet50_fpn", 64),
    ):
        add(f"torchvision/{name}", "detector", side, _torchvision_detector(name))
    for row in _SMP.split():
        architecture, _, encoder = row.partition("-")
        add(f"smp/{row}", "segmentation", 128 if architecture == "PAN" else 64, _smp(architecture, encoder))
    add("facenet/InceptionResnetV1", "face", 96, _facenet)
    for name in ("PNet", "ONet"):
        add(f"facenet/mtcnn-{name}", "face", 48, _mtcnn(name))
    for forms, names in _YOLOS.items():
        for name in names.split():
            for form in forms.split():
                add(f"ultralytics/{name}@{form}", "yolo", 64, _yolo(name, form))
    return {network.name: network for network in found}
