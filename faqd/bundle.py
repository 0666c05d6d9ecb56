"""The bundle: one folder in which training, lowering and the bench meet. docs/bundle.md states the format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd import __version__
from faqd.errors import UserError
from faqd.fidelity import RECORD, Branch, all_probabilities
from faqd.files import read_json, sha256, write_json
from faqd.preprocess import Preprocess
from faqd.schema import COUNT, Each, Many, Maybe, unprintable, wrong
from faqd.sweep import members

FORMAT = "faqd-bundle"
VERSION = 1

MANIFEST = "manifest.json"
VERIFY = "verify.json"
EVAL = "eval.npz"
PROBE_OUTPUTS = "probes.npz"
"""What the float networks are held against. Apart from EVAL, which is the same for all students of a teacher."""
TEACHER = "teacher.onnx"
FLOAT_STUDENT = "student.float.onnx"
FLOAT_STUDENT_FP16 = "student.float.fp16.onnx"
"""The float student in FP16: what its engine is built from, for a fair race on a GPU."""
TEACHER_FP16 = "teacher.fp16.onnx"
"""The teacher in FP16, for the same reason; missing from bundles of before, and where the teacher overflows in FP16."""
STUDENT_TENSORRT = "student.tensorrt.onnx"
"""What build-engine builds: FP16 outside the integer layers unless exported with --float-type fp32."""
STUDENT_TENSORRT_FP32 = "student.tensorrt.fp32.onnx"
"""The same graph with FP32 outside the integer layers: what the exact gates run on."""
STUDENT_DEEPSTREAM = "student.deepstream.onnx"
"""STUDENT_TENSORRT behind a normalisation of its own, for nvinfer, which has one factor for all channels."""
STUDENT_ONNXRUNTIME = "student.onnxruntime.onnx"


_TENSOR = {"name": str, "shape": list}
_BRANCHES = Many({"channels": Many(float, 2), "probability": bool}, 1)
_LAYER = {**dict.fromkeys(("name", "operator", "weights", "inputs"), str), "weight_shape": Many(COUNT)}
_FACTS = {
    **dict.fromkeys(("faqd", "name", "kind", "architecture"), str),
    "weight_bits": COUNT,
    "act_bits": COUNT,
    "target": ("tensorrt", "onnxruntime"),
    "preprocess": {"height": COUNT, "width": COUNT, "mean": Many(float), "std": Many(float), "channels": str},
    "classes": Maybe(Many(str)),
    "input": _TENSOR,
    "outputs": Many(_TENSOR, 1),
    "layers": Many(_LAYER),
    "size": dict.fromkeys(("parameters", "float32_bytes", "int8_bytes", "packed_bytes"), float),
    "teacher": {"name": str, "sha256": str},
    "files": Each({"sha256": str, "bytes": float}),
}
"""What every manifest holds; `verify` asks for more."""
_COMPARED = {"images": COUNT, "snr_db": Each(Maybe(float))}
FLOATS = {"islands": Many({"operators": Each(str), "line": str}), "int8_share": float}
"""What a manifest, and the record of a bench, says of what stays float; older ones say nothing of it."""
_FLOAT32_PART = {"nodes": Many(str, 1), "reason": str}
_OPTIONAL = {
    "as_trained": Maybe(_COMPARED),
    "rounding": Maybe(str),
    "float32_parts": Many(_FLOAT32_PART),
    "proof": Each(("passed", "failed")),
    "fidelity": Each(RECORD),
    **FLOATS,
}
WORTH_INT8 = 0.5
"""Below this share of multiply-accumulates on integers, what is left float decides how long a network takes."""


def floats_in_words(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a manifest, or `inspect`, says of what stays float: nothing where all is integer."""
    share, islands = facts.get("int8_share", 1.0), facts.get("islands", [])
    if islands:
        first = f"{next(iter(islands[0]['operators']), '')}{islands[0]['line']}"
        count = f"{len(islands)} float {'island' if len(islands) == 1 else 'islands'}"
        yield f"{count}, the first at {first}: {float_operators(islands)}"
    if islands or share < 1:
        verdict = "" if share >= WORTH_INT8 else ": INT8 is not worth it here"
        yield f"{100 * share:.1f} % of the multiply-accumulates run in INT8{verdict}."


def float32_in_words(reasons: Sequence[str], places: int = 1) -> Iterator[str]:
    """What to say of the parts of an FP16 file that stay FP32, the first `places` of them by their reasons."""
    if reasons:
        count = f"{len(reasons)} float {'part' if len(reasons) == 1 else 'parts'} of {STUDENT_TENSORRT}"
        more = f"; and {len(reasons) - places} more" if len(reasons) > places else ""
        yield f"{count} FP32, for FP16 is too coarse there: {'; '.join(reasons[:places])}{more}."


def float_operators(islands: list[dict[str, Any]]) -> str:
    """What is in them, the most frequent first: `LayerNorm (5 times), softmax`."""
    operators = Counter(operator for island in islands for operator in island["operators"].values())
    return ", ".join(f"{name}{f' ({count} times)' if count > 1 else ''}" for name, count in operators.most_common())


@dataclass(frozen=True)
class Bundle:
    """A bundle folder whose manifest was read and whose files have the recorded SHA-256."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """What tables call the student, such as `resnet20 8/8`."""
        return str(self.manifest["name"])

    @property
    def kind(self) -> str:
        """`distilled` or `ptq`."""
        return str(self.manifest["kind"])

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_json(self.manifest["preprocess"])

    @property
    def takes_pixels(self) -> bool:
        """Whether its networks take uint8 pixels (N, H, W, C) and preprocess them; else float32 (N, C, H, W)."""
        return bool(self.manifest.get("input", {}).get("dtype") == "uint8")

    def network_input(self, images_NHWC: NDArray[np.uint8]) -> NDArray[Any]:
        """What the networks of this bundle are fed for fitted images such as those of eval.npz."""
        if not self.takes_pixels:
            return self.preprocess.normalise(images_NHWC)
        # RGB goes in; eval.npz has the network's own order.
        return np.ascontiguousarray(images_NHWC[..., ::-1] if self.preprocess.channels == "bgr" else images_NHWC)

    def has(self, name: str) -> bool:
        return name in self.manifest["files"]

    @property
    def branches(self) -> dict[str, tuple[Branch, ...]]:
        """What its outputs are made of; nothing for bundles of before."""
        outputs = self.manifest["outputs"]
        return {each["name"]: tuple(map(Branch.from_json, each["branches"])) for each in outputs if "branches" in each}

    def is_probability(self, name: str) -> bool:
        """Whether an output is what comes out of a sigmoid or a softmax, as far as this bundle says."""
        return all_probabilities(self.branches.get(name, ()))

    def path(self, name: str) -> Path:
        """The path of a file of the bundle; UserError if this bundle was made without it."""
        if not self.has(name):
            raise UserError(f"{self.folder}: this bundle holds no {name}; it has {', '.join(self.manifest['files'])}.")
        return self.folder / name

    def onnx_files(self) -> list[str]:
        return [name for name in self.manifest["files"] if name.endswith(".onnx")]

    def evaluation(self) -> Evaluation:
        """eval.npz; UserError where it is no such file, or holds nothing to evaluate on."""
        path = self.path(EVAL)
        arrays = _read_arrays(path)
        outputs = _by_output(arrays, _TEACHER_KEY)
        images = arrays.get("images", np.zeros(0))
        if images.dtype != np.uint8 or images.ndim != 4 or not images.size or not outputs:
            raise UserError(f"{path}: holds no images or no outputs of the teacher; export the run again.")
        size = (self.preprocess.height, self.preprocess.width)
        if images.shape[1:3] != size:
            raise UserError(
                f"{path}: its images are not the {size[0]}x{size[1]} of the manifest; export the run again."
            )
        labels = arrays.get("labels")
        if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
            raise UserError(f"{path}: has not one label for each image; export the run again.")
        names, sizes = arrays.get("names"), arrays.get("sizes")
        for found, kinds, shape in ((names, "U", images.shape[:1]), (sizes, "iu", (len(images), 2))):
            if found is not None and (found.dtype.kind not in kinds or found.shape != shape):
                raise UserError(f"{path}: has not one name and one size for each image; export the run again.")
        return Evaluation(images, labels, _of_numbers(path, outputs), names, sizes)

    def probe_outputs(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """What `student` (its own modules with nothing rounded) and `teacher` gave in torch for the probes, by output;
        UserError where the file is damaged."""
        path = self.path(PROBE_OUTPUTS)
        arrays = _read_arrays(path)
        return {network: _of_numbers(path, _by_output(arrays, f"{network}.")) for network in ("student", "teacher")}


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {key: np.asarray(arrays[key]) for key in arrays}
    except (
        Exception
    ) as error:  # zipfile, zlib, numpy and the tokenizer of its headers raise a dozen kinds, undocumented
        raise UserError(f"{path}: not the data of a bundle ({error}); export the run again.") from error


def _by_output(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {key.removeprefix(prefix): values for key, values in arrays.items() if key.startswith(prefix)}


def _of_numbers(path: Path, outputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    for name, values in outputs.items():
        if values.dtype.kind != "f" or not values.size or not values.ndim:
            raise UserError(f"{path}: the output {name} has no numbers of a network; export the run again.")
    return outputs


@dataclass(frozen=True)
class Evaluation:
    """What eval.npz holds: fitted uint8 images (N, H, W, C), labels (N,) int64 if there are any, and per network
    output the float teacher's values (first axis N, fewer of dense ones). Of image files names (N,),
    relative to their folder, and sizes (N, 2), height and width before they were fitted: what annotations go by."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    teacher: dict[str, NDArray[np.float32]]
    names: NDArray[np.str_] | None = None
    sizes: NDArray[np.int64] | None = None

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {"images": self.images}
        if self.labels is not None:
            arrays["labels"] = self.labels.astype(np.int64)
        if self.names is not None and self.sizes is not None:
            arrays |= {"names": self.names, "sizes": self.sizes}
        arrays |= {_TEACHER_KEY + name: values for name, values in self.teacher.items()}
        np.savez(path, **arrays)


STORED_VALUES = 2**24
"""Values of one output of the teacher that are kept, 64 MiB: dense outputs for the first images only."""

_TEACHER_KEY = "teacher."


def save_probe_outputs(folder: Path, outputs: dict[str, dict[str, NDArray[np.float32]]]) -> None:
    """Write what `Bundle.probe_outputs` reads."""
    arrays: dict[str, Any] = {
        f"{network}.{name}": values for network, named in outputs.items() for name, values in named.items()
    }
    np.savez(folder / PROBE_OUTPUTS, **arrays)


def load_bundle(folder: Path) -> Bundle:
    """Read and check a bundle; UserError where it is missing, from a newer faqd, or a file was changed."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: not a bundle (no {MANIFEST}){_instead(folder)}")
    manifest = read_json(folder / MANIFEST)
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("files"), dict)
    ):
        raise UserError(f"{folder / MANIFEST}: not the manifest of a bundle; export the run again.")
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{folder}: bundle version {manifest.get('version')}, this faqd reads version {VERSION}: "
            "export the run again with this faqd, or install the one that made the bundle."
        )
    for name in manifest["files"]:
        if Path(name).name != name:
            raise UserError(f"{folder / MANIFEST}: the file name {name!r} leaves the folder.")
    for complaint in _complaints(manifest):
        raise UserError(f"{folder / MANIFEST}: damaged, {complaint}; export the run again.")
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing from the bundle; copy the whole folder, or export the run again.")
        if sha256(path) != record["sha256"]:
            raise UserError(f"{path}: changed since the bundle was written (SHA-256 differs); export the run again.")
    return Bundle(folder, manifest)


def _instead(folder: Path) -> str:
    """What a folder is that is no bundle, and what to do."""
    if folder.is_file():
        return f"; it is a file: name the folder, {folder.parent}."
    if (folder / "run.json").is_file():
        return f"; it is a run, of which `faqd-deploy export {folder} --out BUNDLE` makes one."
    if within := [found.name for found in members(folder, MANIFEST)]:
        return f"; it holds bundles: name one of {', '.join(within)}."
    return f". `faqd-deploy export RUN --out {folder if not folder.exists() else 'BUNDLE'}` makes one."


def _complaints(manifest: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a manifest; its strings are printed, so none may hold what a terminal obeys."""
    yield from wrong(manifest, _FACTS)
    yield from wrong(manifest, {key: rule for key, rule in _OPTIONAL.items() if key in manifest})
    for output in manifest.get("outputs", ()):
        if isinstance(output, dict) and "branches" in output:
            yield from wrong(output, {"branches": _BRANCHES})
    # Names of classes go into files alone, in their own quotes.
    if (text := unprintable({key: value for key, value in manifest.items() if key != "classes"})) is not None:
        yield f"{text[:40]!r} holds control characters"
    try:
        Preprocess.from_json(manifest["preprocess"])
    except (TypeError, UserError) as error:
        yield f"preprocess: {error}".rstrip(".")


def without_fp16_teacher(bundle: Bundle) -> str:
    """What an engine of the FP32 teacher means, as a sentence."""
    return (
        f"{bundle.folder} holds no {TEACHER_FP16}, so its teacher's engine is FP32, slower than it need be: export the "
        "run again, which tells the reason where the teacher has no FP16 form."
    )


def write_manifest(folder: Path, facts: dict[str, Any], made_from: dict[str, str]) -> Bundle:
    """Write the manifest of the files that stand in `folder`; `made_from` gives each one's source SHA-256."""
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size, "made_from": source}
        for name, source in made_from.items()
    }
    manifest = {"format": FORMAT, "version": VERSION, "faqd": __version__, **facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    return Bundle(folder, manifest)
