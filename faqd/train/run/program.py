"""A user's network kept in the run itself, so that the run travels without the user's code: as torch.export's program,
which is read without executing anything (`faqd.train.networks.program_file`)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faqd.errors import first_line
from faqd.files import sha256, written_beside
from faqd.quantize.capture.program import exported
from faqd.quantize.outputs import named_outputs
from faqd.train.networks.own_tensors import own_tensors, put_tensors
from faqd.train.networks.program_file import SUFFIX, read_program
from faqd.train.networks.source import NetworkSource


def put_programs(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write the programs of a run's networks that come from a user's file or module, and return the entries of the
    record with what was written: `program` and `program_sha256`, or `no_program`, the reason.

    The student and its teacher are mostly one network, and then one file.
    """
    entries: dict[str, Any] = {}
    for role in ("network", "teacher"):
        if role not in record:
            continue
        same = next((other for other in entries if record[other] == record[role]), None)
        source = NetworkSource.from_json(record[role], folder)
        if same is not None:
            entries[role] = entries[same]
        elif source.architecture is None:
            entries[role] = {**record[role], **_put(folder / f"{role}{SUFFIX}", source)}
        else:
            entries[role] = record[role]
    return entries


def _put(path: Path, source: NetworkSource) -> dict[str, str]:
    try:
        network = source.build().eval()
        own = {key: tensor.clone() for key, tensor in own_tensors(network).items()}
        # Each build draws other weights; those of the run lie beside it, and a resumed run is to have the same bytes.
        put_tensors(network, {key: torch.ones_like(t) if t.is_floating_point() else t for key, t in own.items()})
        with written_beside(path) as temporary, torch.no_grad():
            archive = io.BytesIO()  # a file's name would be that of a folder in it
            torch.export.save(exported(network, source.example(), source.name), archive)
            temporary.write_bytes(archive.getvalue())
            put_tensors(network, own)
            _refuse_another(network, read_program(temporary), source)
    except Exception as error:  # of the user's modules, and all that torch cannot write or read back
        return {"no_program": first_line(error) or type(error).__name__}
    return {"program": path.name, "program_sha256": sha256(path)}


def _refuse_another(network: nn.Module, again: nn.Module, source: NetworkSource) -> None:
    """ValueError where what was read back has other tensors, or computes something else with these."""
    own, found = own_tensors(network), own_tensors(again)
    if {key: value.shape for key, value in own.items()} != {key: value.shape for key, value in found.items()}:
        raise ValueError("its program has other tensors than it has")
    put_tensors(again, own)
    images = torch.randn(source.example(3).shape, generator=torch.Generator().manual_seed(0))
    wanted, outputs = named_outputs(network(images)), named_outputs(again(images))
    if wanted.keys() != outputs.keys() or not all(torch.equal(wanted[name], outputs[name]) for name in wanted):
        raise ValueError("its program computes something else")
