"""Write a trained network as ONNX, with the resize and the normalisation that precede it inside the graph."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.core.augment import resize_matrix
from stages.core.errors import InputError
from stages.core.loader import normalise
from stages.core.onnx_model import INPUT, OUTPUT, OnnxSpec

# The newest of the exporter's that all families of timm were seen to pass.
_OPSET = 18


class Deployed(nn.Module):
    """From packed pixels to logits: what evaluation does to a batch before the network, and the network."""

    resize: Tensor  # (network_size, image_size), float32

    def __init__(
        self, network: nn.Module, image_size: int, network_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = mean, std
        self.resizes = image_size != network_size
        # Squares are resized as a whole: one matrix for rows and columns (stages/core/augment.py).
        start, length = torch.zeros(1), torch.full((1,), float(image_size))
        self.register_buffer("resize", resize_matrix(start, length, network_size, image_size)[0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images uint8 (N, image_size, image_size, 3)."""
        planes = images.permute(0, 3, 1, 2).to(torch.float32)
        if self.resizes:
            planes = torch.matmul(self.resize, torch.matmul(planes, self.resize.t()))
        logits: Tensor = self.network(normalise(planes, self.mean, self.std))
        return logits


def export(network: nn.Module, spec: OnnxSpec, path: Path) -> None:
    """Write a float32 network on the CPU, in evaluation mode, to `path`; the batch size stays free.

    InputError when the network does what ONNX cannot say. The exporter is PyTorch's older one, which traces the
    network: it takes a tenth of the time of the newer one, and what it wrote is compared afterwards.
    """
    deployed = Deployed(network, spec.image_size, spec.network_size, spec.mean, spec.std).eval()
    example = torch.zeros(2, spec.image_size, spec.image_size, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # remarks on its age, and on everything that it takes for constant
            torch.onnx.export(
                deployed,
                (example,),
                str(path),
                dynamo=False,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "N"}, OUTPUT: {0: "N"}},
            )
    except OSError:  # the disk's fault, not the network's
        raise
    except Exception as error:  # of an operator that it does not know: TypeError, IndexError and others, too
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise InputError(
            f"{spec.architecture} cannot be exported to ONNX: {reason}; choose another model.name, or leave this "
            "stage out: `dvc repro evaluate profile drift` (such a run can be neither registered nor retrained)"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the process writes to its standard output: the exporter's C++ part prints the graph where it fails."""
    sys.stdout.flush()
    original = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(original, 1)
        os.close(original)
        os.close(nowhere)
