"""Stage export: the classifier as ONNX, checked against PyTorch on every validation image.

Inputs   models/classifier/, data/processed/
Outputs  models/onnx/          model.onnx, model.json (stages/core/onnx_model.py)
         metrics/export.json   images whose class differs, largest difference of the logits, top-1, size in 10^6 bytes
Beside   metrics/export_speed.json   images per second of both. Times differ from run to run, so this is no DVC out
Command  python -m stages.export
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.errors import InputError
from stages.core.params import Section, load_params
from stages.core.runtime import RuntimeParams, num_threads
from stages.core.stopping import run_stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.core.dataset import Split
    from stages.core.onnx_model import OnnxModel
    from stages.core.recipe import Precision

METRICS = Path("metrics/export.json")
SPEED = Path("metrics/export_speed.json")

_BATCH_SIZE = 64
_TIMED_BATCHES = 10  # of the pass in bfloat16, which is run for its time only
# Rounding gives differences of 1e-6 of the largest logit; above this, the graph computes something else.
_TOLERANCE = 1e-3


class Params(Section):
    """What this stage reads: the machine. The rest travels with the model and the images."""

    runtime: RuntimeParams


def main(params: Params) -> None:
    """Write models/onnx/, metrics/export.json and the speeds; InputError when the exported model computes otherwise."""
    import torch

    from stages.core import device, inference, model, onnx_export, onnx_model, precision
    from stages.core.dataset import load_meta, load_split
    from stages.core.loader import evaluation_batches, open_source
    from stages.core.output import replace_directory, sha256_of, write_json
    from stages.core.progress import stage_summary

    meta = load_meta()
    split = load_split("val", meta)
    where = device.set_up(params.runtime.model_copy(update={"device": "cpu"}))  # which onnxruntime computes on
    network, spec = model.load(model.CLASSIFIER, where)
    if spec.class_ids != meta.class_ids:
        raise InputError(f"{model.CLASSIFIER} was trained on other classes than data/processed has; run `dvc repro`")
    onnx_spec = onnx_model.OnnxSpec.model_validate(
        spec.model_dump(exclude={"sha256"})
        | {"image_size": meta.image_size, "network_size": spec.image_size}
        | {"crop_mode": meta.crop_mode, "interpolation": meta.interpolation}
    )

    def torch_logits(name: Precision) -> Callable[[Split], Iterator[NDArray[np.float32]]]:
        policy = precision.resolve(name, where)

        def batches(images: Split) -> Iterator[NDArray[np.float32]]:
            source = open_source(images, where, False, 0)
            inputs = evaluation_batches(source, spec.mean, spec.std, spec.image_size, _BATCH_SIZE, policy.dtype)
            return (inference.predict(network, [batch], policy).numpy() for batch in inputs)

        return batches

    with stage_summary("export") as made:
        with replace_directory(onnx_model.ONNX) as out:
            onnx_export.export(network, onnx_spec, out / "model.onnx")
            onnx_spec = onnx_spec.model_copy(update={"sha256": sha256_of(out / "model.onnx")})
            write_json(out / "model.json", onnx_spec.model_dump())
            start = time.perf_counter()
            exported = onnx_model.load(out, num_threads(params.runtime))
            load_seconds = time.perf_counter() - start
            size_mb = (out / "model.onnx").stat().st_size / 1e6
            expected, fp32_speed = _timed(torch_logits("fp32"), split)
            logits, onnx_speed = _timed(partial(_onnx_logits, exported), split)
            largest = _check(expected, logits, spec.architecture)
        speeds = {"onnxruntime": onnx_speed, "torch_fp32": fp32_speed}
        if precision.has_bf16(where):
            speeds["torch_bf16"] = _timed(torch_logits("bf16"), _first(split, _TIMED_BATCHES * _BATCH_SIZE))[1]
        num_different = int((expected.argmax(axis=1) != logits.argmax(axis=1)).sum())
        results = {
            "num_compared": len(split.labels),
            "num_different": num_different,
            "largest_difference": float(f"{largest:.1e}"),
            "onnx_top1": round(float((logits.argmax(axis=1) == split.labels).mean()), 6),
            "size_mb": round(size_mb, 3),
        }
        write_json(METRICS, results)
        write_json(
            SPEED,
            {"batch_size": _BATCH_SIZE, "threads": torch.get_num_threads(), "load_ms": round(1e3 * load_seconds, 1)}
            | {"images_per_second": {name: round(speed, 1) for name, speed in speeds.items()}},
        )
        made.append(f"{num_different} of {len(split.labels):,} predictions differ, logits by at most {largest:.1e}")
        made.append(", ".join(f"{name} {speed:,.0f} img/s" for name, speed in speeds.items()))
        made.append(f"{size_mb:.1f} MB in {onnx_model.ONNX}")


def _onnx_logits(exported: OnnxModel, split: Split) -> Iterator[NDArray[np.float32]]:
    import numpy as np

    from stages.core.dataset import read_rows

    for start in range(0, len(split.labels), _BATCH_SIZE):
        indices = np.arange(start, min(start + _BATCH_SIZE, len(split.labels)))
        images = np.empty((len(indices), *split.images.shape[1:]), dtype=np.uint8)
        read_rows(split, indices, images)
        yield exported.logits(images)


def _timed(
    predict: Callable[[Split], Iterator[NDArray[np.float32]]], split: Split
) -> tuple[NDArray[np.float32], float]:
    """Logits (N, num_classes), and images per second from packed pixels to logits after a batch to warm up."""
    import numpy as np

    from stages.core.progress import progress

    list(predict(_first(split, _BATCH_SIZE)))
    start = time.perf_counter()
    logits = list(progress(predict(split), "export", -(-len(split.labels) // _BATCH_SIZE), "batch"))
    return np.concatenate(logits), len(split.labels) / (time.perf_counter() - start)


def _first(split: Split, count: int) -> Split:
    checksums = None if split.checksums is None else split.checksums[:count]
    return split._replace(images=split.images[:count], labels=split.labels[:count], checksums=checksums)


def _check(expected: NDArray[np.float32], logits: NDArray[np.float32], architecture: str) -> float:
    """The largest difference; InputError when it is more than rounding explains."""
    import numpy as np

    if not np.isfinite(expected).all():
        raise InputError("the classifier's outputs are not finite: the training run that made it diverged")
    largest = float(np.abs(expected - logits).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not largest <= _TOLERANCE * scale:  # NaN, too
        raise InputError(
            f"{architecture}: the exported model computes something else than PyTorch: the logits (up to {scale:.1f}) "
            f"differ by up to {largest:.1e}; choose another model.name"
        )
    return largest


if __name__ == "__main__":
    run_stage(lambda: main(load_params(Params)), "export")
