"""What is said of an engine before it is loaded: whether this machine can run it, and what to do if not."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faqd.deploy.board import doctor
from faqd.deploy.board.doctor import Finding, examine, jetson, lines
from faqd.deploy.cuda import cuda
from faqd.deploy.cuda.interface import Device
from faqd.deploy.engine.record import (
    check_gpu,
    check_version,
    older_driver,
    other_gpu,
    wrong_gpu,
    wrong_system,
    wrong_version,
)
from faqd.deploy.engine.trt import Name, TensorRT
from faqd.errors import UserError
from faqd.files import sha256, write_json
from tests.fixtures.toy_runs import faqd_deploy

ORIN = Device("Orin", "8.7", 1 << 30, "540.4.0", "12.6")
ADA = Device("NVIDIA RTX 4090", "8.9", 1 << 30, "580.65", "13.0")
TURING = Device("NVIDIA T4", "7.5", 1 << 30, "580.65", "13.0")
HERE = {"system": platform.system(), "architecture": platform.machine()}


def tensorrt(version: str, name: Name = "tensorrt") -> TensorRT:
    return TensorRT(name, SimpleNamespace(__version__=version))


def made_by(version: str, name: str = "tensorrt", device: Device | None = ADA, **options: Any) -> dict[str, Any]:
    gpu = None if device is None else vars(device)
    return {"builder": {"name": name, "version": version}, "platform": HERE, "gpu": gpu, "options": options}


@pytest.mark.parametrize(
    ("record", "here", "fits"),
    [
        (made_by("10.13.3.9"), tensorrt("10.13.3.9"), True),
        (made_by("10.13.3.9"), tensorrt("10.13.3.10"), True),  # A build number is no version.
        (made_by("10.13.3"), tensorrt("10.13.2"), False),
        (made_by("10.3.0"), tensorrt("11.4.1"), False),
        (made_by("1.7.1", "tensorrt_rtx"), tensorrt("10.3.0"), False),
        (made_by("10.3.0", version_compatible=True), tensorrt("10.13.3"), True),
        (made_by("10.3.0", version_compatible=True), tensorrt("11.4.1"), True),
        (made_by("11.4.1", version_compatible=True), tensorrt("12.0.0"), False),
        (made_by("10.13.3", version_compatible=True), tensorrt("10.3.0"), False),
    ],
)
def test_an_engine_runs_on_its_version_or_a_newer_one_if_built_so(
    record: dict[str, Any], here: TensorRT, fits: bool
) -> None:
    complaint = wrong_version(record, here)
    assert (complaint is None) == fits
    if complaint is not None:
        assert str(here) in complaint and record["builder"]["version"] in complaint
        with pytest.raises(UserError, match="build-engine"):
            check_version(Path("net.engine"), record, here)


@pytest.mark.parametrize(
    ("record", "device", "verdict"),
    [
        (made_by("10.3.0"), ADA, "good"),
        (made_by("10.3.0"), ORIN, "wrong"),
        (made_by("10.3.0"), Device("NVIDIA L4", "8.9", 1, None, "13.0"), "other"),
        (made_by("10.3.0", hardware_compatibility="ampere+"), ORIN, "other"),
        (made_by("10.3.0", hardware_compatibility="ampere+"), TURING, "wrong"),
        (made_by("10.13.0", hardware_compatibility="same-compute-capability"), ORIN, "wrong"),
        (made_by("1.7.1", "tensorrt_rtx", device=None), ADA, "good"),
        (made_by("1.7.1", "tensorrt_rtx", device=None), ORIN, "other"),
        (made_by("1.7.1", "tensorrt_rtx", device=ADA), TURING, "wrong"),
    ],
)
def test_an_engine_runs_on_its_gpu_or_on_more_if_built_so(record: dict[str, Any], device: Device, verdict: str) -> None:
    complaint, doubt = wrong_gpu(record, device), other_gpu(record, device)
    assert (complaint is not None) == (verdict == "wrong")
    if verdict == "wrong":
        with pytest.raises(UserError, match="build-engine"):
            check_gpu(Path("net.engine"), record, device)
    elif verdict == "other":
        assert doubt is not None and device.name in doubt
        with pytest.warns(UserWarning, match="net.engine"):
            check_gpu(Path("net.engine"), record, device)
    else:
        assert doubt is None


def test_an_engine_stays_with_its_system_unless_rtx_built_it() -> None:
    record = made_by("10.3.0") | {"platform": {"system": "Windows", "architecture": "AMD64"}}
    assert "Windows AMD64" in str(wrong_system(record))
    assert wrong_system(record | {"builder": {"name": "tensorrt_rtx", "version": "1.7.1"}}) is None
    assert wrong_system(made_by("10.3.0")) is None
    assert wrong_system({}) is None  # Trusted without a record.


def test_an_older_driver_is_said() -> None:
    assert "CUDA 13.0" in str(older_driver(made_by("10.3.0"), ORIN))
    assert older_driver(made_by("10.3.0", device=ORIN), ADA) is None


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "student.tensorrt.engine"
    path.write_bytes(b"plan")
    record = made_by("10.13.3") | {"format": "faqd-engine", "version": 1, "engine": {"sha256": sha256(path)}}
    write_json(tmp_path / "student.tensorrt.engine.json", record)
    return path


def on(monkeypatch: pytest.MonkeyPatch, device: Device | None, *here: TensorRT) -> None:
    """The machine that the doctor sees."""
    found: dict[str, Any] = {trt.name: trt for trt in here}
    monkeypatch.setattr(doctor, "flavour", lambda name: found.get(name, f"No module named '{name}'"))
    monkeypatch.setattr(cuda, "device_or_none", lambda backend=None: (device, "" if device else "no GPU is here"))


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.status for finding in findings}


def test_an_engine_that_fits_is_said_to(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, ADA, tensorrt("10.13.3"), tensorrt("1.7.1", "tensorrt_rtx"))
    found = examine(engine)
    assert verdicts(found) == dict.fromkeys(("file", "system", "TensorRT", "GPU", "driver"), "good")
    assert any("NVIDIA RTX 4090, compute capability 8.9" in line for line in lines(found))


@pytest.mark.parametrize(
    ("device", "here", "fails", "cure"),
    [
        (ADA, tensorrt("11.4.0"), {"TensorRT"}, "pip install tensorrt==10.13.3"),
        (ADA, tensorrt("1.7.1", "tensorrt_rtx"), {"TensorRT"}, "pip install tensorrt==10.13.3"),
        (ADA, None, {"TensorRT"}, "[tensorrt]'"),
        (TURING, tensorrt("10.13.3"), {"GPU"}, "build-engine"),
        (None, tensorrt("10.13.3"), {"GPU"}, ""),
    ],
    ids=["newer", "rtx", "none", "other GPU", "no GPU"],
)
def test_what_does_not_fit_is_said_with_its_cure(
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: Device | None,
    here: TensorRT | None,
    fails: set[str],
    cure: str,
) -> None:
    on(monkeypatch, device, *([here] if here else []))
    found = examine(engine)
    assert {finding.what for finding in found if finding.status == "fails"} == fails
    assert any(cure in finding.cure for finding in found if finding.status == "fails")


def test_a_changed_engine_fails(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, ADA, tensorrt("10.13.3"))
    engine.write_bytes(b"another plan")
    assert verdicts(examine(engine))["file"] == "fails"


def test_the_command_says_it_by_its_exit_code(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on(monkeypatch, ADA, tensorrt("10.13.3"))
    assert faqd_deploy("doctor", engine, "--json", tmp_path / "doctor.json").code == 0
    assert {entry["status"] for entry in json.loads((tmp_path / "doctor.json").read_text())} == {"good"}
    assert faqd_deploy("doctor").code == 0
    on(monkeypatch, None, tensorrt("10.13.3"))
    outcome = faqd_deploy("doctor", engine)
    assert (outcome.code, "cannot run here (GPU)" in outcome.stderr) == (1, True)
    assert "no GPU is here" in outcome.stdout
    assert faqd_deploy("doctor").code == 1
    assert faqd_deploy("doctor", tmp_path / "absent.engine").code == 2


@pytest.mark.parametrize(
    "record",
    [
        None,
        "{",
        [],
        {},
        {"builder": "x"},
        {"builder": {"name": "tensorrt"}},
        {"gpu": "Ada"},
        {"gpu": {"name": "Ada"}},
        {"platform": {"system": "Linux"}},
        {"options": [1]},
        {"version": 2},
    ],
    ids=str,
)
def test_an_engine_without_a_whole_record_is_bad_input(engine: Path, record: Any) -> None:
    path = engine.with_name(f"{engine.name}.json")
    if record is None:
        path.unlink()
    elif isinstance(record, dict) and record:
        write_json(path, json.loads(path.read_text()) | record)
    else:
        path.write_text(record if isinstance(record, str) else json.dumps(record))
    outcome = faqd_deploy("doctor", engine)
    assert outcome.code == 2
    assert "Traceback" not in outcome.stderr and "error: " in outcome.stderr


@pytest.mark.parametrize(
    ("device", "here", "build", "run"),
    [
        (ADA, tensorrt("10.13.3"), "good", "good"),
        (None, tensorrt("1.7.1", "tensorrt_rtx"), "good", "fails"),
        (None, tensorrt("10.13.3"), "note", "fails"),
        (ADA, None, "note", "fails"),
    ],
)
def test_the_machine_without_an_engine(
    monkeypatch: pytest.MonkeyPatch, device: Device | None, here: TensorRT | None, build: str, run: str
) -> None:
    on(monkeypatch, device, *([here] if here else []))
    found = examine(None)
    assert verdicts(found)["build engines"] == build and verdicts(found)["run engines"] == run
    assert all(finding.cure for finding in found if finding.status == "fails")


def test_a_jetson_is_known_by_its_files(tmp_path: Path) -> None:
    assert jetson(tmp_path) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n")
    assert jetson(tmp_path) == "Jetson, Jetson Linux 36.4.3 (JetPack 6.1 or 6.2: Python 3.10, CUDA 12.6, TensorRT 10.3)"
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "model").write_bytes(b"NVIDIA Jetson AGX Thor\0")
    (tmp_path / "etc" / "nv_tegra_release").write_text("# R99 (release), REVISION: 1.0\n")
    assert jetson(tmp_path) == "NVIDIA Jetson AGX Thor, Jetson Linux 99.1.0"


@pytest.mark.parametrize(
    "builder", [{"name": 7, "version": "10.3"}, {"name": "tensorrt", "version": ""}, {"name": "tensorrt"}, []]
)
def test_a_record_without_its_builder_is_damaged(tmp_path: Path, builder: Any) -> None:
    (tmp_path / "net.engine").touch()
    record = {"format": "faqd-engine", "version": 1, "engine": {"sha256": ""}, "builder": builder}
    write_json(tmp_path / "net.engine.json", record)
    with pytest.raises(UserError, match=r"net\.engine\.json: the record is damaged\. Build it on this machine"):
        examine(tmp_path / "net.engine")
    (tmp_path / "net.engine.json").write_text("")
    with pytest.raises(UserError, match=r"net\.engine\.json: not valid JSON.*build-engine"):
        examine(tmp_path / "net.engine")


def test_a_folder_is_no_engine(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; name an engine in it, such as .*student\.tensorrt\.engine\.$"):
        examine(tmp_path)
