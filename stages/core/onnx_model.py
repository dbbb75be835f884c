"""The exported model as onnxruntime runs it, without PyTorch or timm, and the facts that travel with it.

models/onnx/
    model.onnx   images uint8 (N, image_size, image_size, 3), RGB, as preprocess packs them -> logits float32
                 (N, num_classes); N is free. The resize to the network's input and the normalisation are inside
    model.json   OnnxSpec
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from stages.core.errors import InputError
from stages.core.image import CropMode, Interpolation
from stages.core.output import check_unaltered
from stages.core.params import Section

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ONNX = Path("models/onnx")
INPUT, OUTPUT = "images", "logits"


class OnnxSpec(Section):
    """model.json of an exported model."""

    architecture: str  # name in timm
    classes: list[str]  # readable names, in the order of the logits
    class_ids: list[str]  # folder names in the training data
    image_size: int  # side in pixels of the squares that images are brought to, as preprocess does
    crop_mode: CropMode
    interpolation: Interpolation
    network_size: int  # side in pixels of the network's input, to which the graph resizes them
    mean: list[float]  # per RGB channel, of pixel values scaled to [0, 1]; in the graph, here to be read
    std: list[float]
    sha256: str | None = None  # of model.onnx; None before it is written


@dataclass(frozen=True)
class OnnxModel:
    """A loaded model: its description and onnxruntime's session."""

    spec: OnnxSpec
    session: InferenceSession

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(N, num_classes) of images (N, image_size, image_size, 3)."""
        result: NDArray[np.float32] = self.session.run([OUTPUT], {INPUT: images})[0]
        return result

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Softmax of the logits, (N, num_classes)."""
        logits = self.logits(images).astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
        return shares


def load_spec(folder: Path = ONNX) -> OnnxSpec:
    """Read model.json of an exported model."""
    path = folder / "model.json"
    try:
        return OnnxSpec.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: not found; run `dvc repro export` (or `dvc checkout`)") from None
    except ValidationError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: no description of an exported model: {reason}; run `dvc repro export`") from None


def load(folder: Path, threads: int) -> OnnxModel:
    """Open an exported model for the CPU; InputError when it is missing, damaged or another than model.json says."""
    import onnxruntime

    spec = load_spec(folder)
    path = folder / "model.onnx"
    if not path.is_file():
        raise InputError(f"{path}: not found; run `dvc repro export` (or `dvc checkout`)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors: it remarks on machines without a GPU otherwise
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common but this
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be loaded: {reason}; run `dvc repro export` (or `dvc checkout`)") from None
    shapes = [value.shape[1:] for value in (*session.get_inputs(), *session.get_outputs())]
    if shapes != [[spec.image_size, spec.image_size, 3], [len(spec.classes)]]:
        raise InputError(f"{path}: its input and output {shapes} are not those of model.json; run `dvc repro export`")
    check_unaltered(path, spec.sha256, "export")
    return OnnxModel(spec, session)
