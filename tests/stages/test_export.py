"""The exported model computes what PyTorch's does, repeats to the bit, and what cannot be exported is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stages import export
from stages.core import inference, onnx_export, onnx_model, precision
from stages.core.dataset import Split
from stages.core.errors import InputError
from stages.core.loader import evaluation_batches, open_source
from stages.core.onnx_model import OnnxSpec
from stages.core.params import load_params
from tests.helpers import files, run
from tests.synthetic import clouds

CPU = torch.device("cpu")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def spec_of(architecture: str, image_size: int, network_size: int, num_classes: int = 5) -> OnnxSpec:
    names = [f"class {number}" for number in range(num_classes)]
    return OnnxSpec(
        architecture=architecture,
        classes=names,
        class_ids=names,
        image_size=image_size,
        crop_mode="center",
        interpolation="bilinear",
        network_size=network_size,
        mean=MEAN,
        std=STD,
    )


def exported(network: nn.Module, spec: OnnxSpec, folder: Path) -> onnx_model.OnnxModel:
    onnx_export.export(network.eval(), spec, folder / "model.onnx")
    (folder / "model.json").write_text(spec.model_dump_json())
    return onnx_model.load(folder, threads=1)


def evaluated(network: nn.Module, images: NDArray[np.uint8], network_size: int) -> NDArray[np.float32]:
    """Logits as the evaluate stage computes them."""
    source = open_source(Split(images, np.zeros(len(images), dtype=np.int64)), CPU, False, 0)
    batches = evaluation_batches(source, MEAN, STD, network_size, 4, torch.float32)
    return inference.predict(network, batches, precision.resolve("fp32", CPU)).numpy()


def test_the_committed_pipeline_exports_a_model_that_agrees(finished_repository: Path) -> None:
    metrics = json.loads((finished_repository / "metrics/export.json").read_text())
    assert metrics["num_compared"] == 60
    assert metrics["num_different"] == 0
    assert 0 <= metrics["largest_difference"] < 1e-4
    assert metrics["onnx_top1"] == json.loads((finished_repository / "metrics/evaluate.json").read_text())["top1"]
    size = (finished_repository / "models/onnx/model.onnx").stat().st_size
    assert metrics["size_mb"] == round(size / 1e6, 3)
    speed = json.loads((finished_repository / "metrics/export_speed.json").read_text())
    assert {"onnxruntime", "torch_fp32"} <= set(speed["images_per_second"])
    assert min(speed["images_per_second"].values()) > 0
    assert run(finished_repository, "git", "check-ignore", "metrics/export_speed.json").stdout


def test_the_model_brings_all_that_using_it_takes(finished_repository: Path) -> None:
    spec = onnx_model.load_spec(finished_repository / "models/onnx")
    meta = json.loads((finished_repository / "data/processed/meta.json").read_text())
    assert spec.classes == meta["classes"]
    assert (spec.image_size, spec.crop_mode, spec.interpolation) == (32, meta["crop_mode"], meta["interpolation"])
    assert (spec.mean, spec.std) == (meta["mean"], meta["std"])


def test_it_repeats_to_the_bit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    before = files(Path("models/onnx")) | {"metrics": Path("metrics/export.json").read_bytes()}
    export.main(load_params(export.Params))
    assert files(Path("models/onnx")) | {"metrics": Path("metrics/export.json").read_bytes()} == before


@pytest.mark.parametrize(
    ("architecture", "network_size"), [("test_resnet", 24), ("test_resnet", 48), ("test_vit", 160)]
)
def test_pixels_in_logits_out_for_any_batch_and_size(architecture: str, network_size: int, tmp_path: Path) -> None:
    """Resize, normalisation and network are in the graph; the batch that it was traced with is not."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=5).eval()
    images = clouds(9, 32, 32)
    model = exported(network, spec_of(architecture, 32, network_size), tmp_path)
    expected = evaluated(network, images, network_size)
    assert np.abs(expected).max() > 0.05
    assert expected.std(axis=0).max() > 1e-3, "the images differ in the network's eyes"
    for count in (1, 2, 9):
        np.testing.assert_allclose(model.logits(images[:count]), expected[:count], atol=2e-5)
    shares = torch.softmax(torch.from_numpy(expected).double(), dim=1).numpy()
    np.testing.assert_allclose(model.probabilities(images), shares, atol=1e-5)


class Frequencies(nn.Module):
    """A network that ONNX has no words for."""

    def forward(self, images: Tensor) -> Tensor:
        means: Tensor = torch.fft.fft2(images).abs().mean(dim=(2, 3))
        return means


class Pairs(nn.Module):
    """A network whose trace with two images is another function than the network."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean(dim=(2, 3))
        return means * (2 if len(images) == 2 else 1)


def test_what_onnx_cannot_say_is_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^frequencies cannot be exported to ONNX: .*fft.*; choose another"):
        exported(Frequencies(), spec_of("frequencies", 16, 16, 3), tmp_path)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    images = clouds(6, 16, 16)
    model = exported(Pairs(), spec_of("pairs", 16, 16, 3), tmp_path)
    expected, found = evaluated(Pairs(), images, 16), model.logits(images)
    with pytest.raises(InputError, match="pairs: the exported model computes something else than PyTorch"):
        export._check(expected, found, "pairs")
    with pytest.raises(InputError, match="computes something else"):
        export._check(expected, np.full_like(expected, np.nan), "pairs")
    assert export._check(expected, expected + np.float32(1e-5), "pairs") == pytest.approx(1e-5, rel=0.1)


def test_a_model_that_is_missing_damaged_or_another_is_refused(repository: Path) -> None:
    folder = repository / "models/onnx"
    path, description = folder / "model.onnx", folder / "model.json"
    content, text = path.read_bytes(), description.read_text()
    for file in (path, description):
        file.chmod(0o644)
    description.write_text(text.replace('"image_size": 32', '"image_size": 33'))
    with pytest.raises(InputError, match=r"model\.onnx: its input and output .* are not those of model\.json"):
        onnx_model.load(folder, 1)
    description.write_text("{}")
    with pytest.raises(InputError, match=r"model\.json: no description of an exported model"):
        onnx_model.load(folder, 1)
    description.write_text(text)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"model\.onnx: cannot be loaded: .*; run `dvc repro export`"):
        onnx_model.load(folder, 1)
    path.unlink()
    with pytest.raises(InputError, match=r"model\.onnx: not found; run `dvc repro export`"):
        onnx_model.load(folder, 1)
    with pytest.raises(InputError, match=r"nowhere/model\.json: not found; run `dvc repro export`"):
        onnx_model.load(repository / "nowhere", 1)


def test_a_model_of_other_classes_is_refused_and_the_old_export_stays(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    spec = json.loads(Path("models/classifier/model.json").read_text())
    spec["class_ids"][0] = "other"
    Path("models/classifier/model.json").write_text(json.dumps(spec))
    before = files(Path("models/onnx"))
    with pytest.raises(InputError, match="other classes"):
        export.main(load_params(export.Params))
    assert files(Path("models/onnx")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [
        "convnextv2_atto",
        "efficientvit_b0",
        "eva02_tiny_patch14_224",
        "fastvit_t8",
        "levit_128s",
        "maxvit_rmlp_pico_rw_256",
        "mobilenetv3_small_050",
        "mobilevit_xxs",
        "regnety_002",
        "swin_tiny_patch4_window7_224",
        "tresnet_m",
        "vit_tiny_patch16_224",
        "xcit_nano_12_p16_224",
    ],
)
def test_families_of_timm_can_be_exported(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=5).eval()
    known = timm.get_pretrained_cfg(architecture)
    assert known is not None
    size = known.input_size[1] if known.fixed_input_size else 64
    images = clouds(5, 64, 64)
    model = exported(network, spec_of(architecture, 64, size), tmp_path)
    export._check(evaluated(network, images, size), model.logits(images), architecture)


@pytest.mark.slow
def test_a_model_of_timm_that_the_exporter_cannot_trace_is_refused(tmp_path: Path) -> None:
    network = timm.create_model("volo_d1_224", num_classes=5).eval()
    with pytest.raises(InputError, match="volo_d1_224 cannot be exported to ONNX: .*col2im"):
        exported(network, spec_of("volo_d1_224", 64, 224), tmp_path)
