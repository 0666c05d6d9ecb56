"""The run folder: what one training was, and what came of it.

run.json says what was asked for and what the network is; weights.safetensors are the final weights,
teacher.safetensors the teacher's; metrics.jsonl has one line per epoch; checkpoint-ITERATION is there until the end.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from faqd import __version__
from faqd.errors import UserError
from faqd.files import read_json, sha256, write_json, written_beside
from faqd.preprocess import Preprocess
from faqd.train.data import DataOptions
from faqd.train.network import NetworkSource, read_tensors

FORMAT = "faqd-run"
VERSION = 1
RECORD = "run.json"
WEIGHTS = "weights.safetensors"
TEACHER_WEIGHTS = "teacher.safetensors"
METRICS = "metrics.jsonl"


def claim(folder: Path, record: dict[str, Any], resume: bool) -> bool:
    """Take `folder` for this run. True if it holds the same run, finished.

    UserError if it holds another run, or an unfinished one without --resume.
    """
    if (folder / RECORD).is_file():
        found = read_record(folder)
        same = found["asked"] == record["asked"] and found["kind"] == record["kind"]
        if not resume:
            raise UserError(f"{folder}: already holds a run. Give another --out, or --resume to go on with this one.")
        if not same:
            names = [k for k in record["asked"] if record["asked"][k] != found["asked"].get(k)]
            raise UserError(
                f"{folder}: holds a run with other options ({', '.join(names) or 'another command'}); --resume needs "
                "the same ones. Give another --out for a new run."
            )
        return (folder / WEIGHTS).is_file()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty and holds no run; give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, {"format": FORMAT, "version": VERSION, "faqd": __version__, **record})
    return False


def read_record(folder: Path) -> dict[str, Any]:
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder}: not a run folder (no {RECORD}).")
    record: dict[str, Any] = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder / RECORD}: not the record of a run.")
    if record.get("version") != VERSION:
        raise UserError(f"{folder}: run version {record.get('version')}, this faqd reads {VERSION}.")
    return record


def finished(folder: Path) -> dict[str, Any]:
    """The record of a finished run; UserError if it was interrupted."""
    record = read_record(folder)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: this run did not finish; run its command again with --resume.")
    return record


def save_weights(path: Path, network: nn.Module) -> None:
    with written_beside(path) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, temporary)


def load_exactly(network: nn.Module, path: Path) -> None:
    """Fill `network` with weights that faqd wrote; UserError if they belong to another network."""
    state = read_tensors(path)
    wanted = network.state_dict()
    if state.keys() != wanted.keys() or any(state[k].shape != wanted[k].shape for k in wanted):
        raise UserError(f"{path}: weights of another network than {path.parent / RECORD} describes.")
    network.load_state_dict(state)


def load_teacher(folder: Path) -> tuple[nn.Module, NetworkSource, str]:
    """Network, source and weights SHA-256 of the teacher in a finished run of either kind."""
    record = finished(folder)
    name = TEACHER_WEIGHTS if record["kind"] == "distill" else WEIGHTS
    source = NetworkSource.from_json(record["teacher"] if record["kind"] == "distill" else record["network"])
    network = source.build()
    load_exactly(network, folder / name)
    return network.eval(), source, sha256(folder / name)


def data_json(options: DataOptions) -> dict[str, Any]:
    return {**asdict(options), "root": str(options.root) if options.root else None}


def data_options(record: dict[str, Any], root: Path | None = None) -> DataOptions:
    """The data options of a run; `root` replaces the recorded place of published data sets."""
    values = {**record["data"]}
    for key in ("image_size", "mean", "std"):
        if isinstance(values[key], list):
            values[key] = tuple(values[key])
    values["root"] = Path(values["root"]) if values["root"] else None
    return replace(DataOptions(**values), root=root) if root else DataOptions(**values)


def run_preprocess(record: dict[str, Any]) -> Preprocess:
    return Preprocess.from_json(record["preprocess"])


def network_input(images_NHWC: Any, preprocess: Preprocess) -> Tensor:
    """Fitted uint8 images to network input, float32."""
    return torch.from_numpy(preprocess.normalise(images_NHWC))
