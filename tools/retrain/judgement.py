"""The proof of a retraining: top-1 of the model at work and of the new one, on clean images and on drifted ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from stages.core import device, inference, model, precision
from stages.core.dataset import Split, check_images, load_file_names, load_meta, load_split
from stages.core.errors import InputError
from stages.core.image import decode
from stages.core.loader import evaluation_batches, open_source
from stages.core.packing import Geometry
from stages.core.source import is_extra
from tools.retrain.labelled import LabelledSet
from tools.retrain.params import Params, RetrainParams

_CHANCE = 0.05  # that held-out images are read so much worse, where drift does no harm: above it nothing is proved
_ROUNDING = 1e-9  # 0.90 - 0.88 is more than 0.02 in floating point

Right = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # whether each clean, and each drifted image is predicted right


@dataclass(frozen=True)
class Accuracies:
    """Top-1 of the model at work and of the new one, on clean validation images and on held-out drifted ones.

    `matched_before` is that of the model at work on clean images if their classes were as frequent as those of the
    drifted ones, some of which may be harder than others; it is worth `num_matched` images.
    """

    clean_before: float
    clean_after: float
    drifted_before: float
    drifted_after: float
    matched_before: float
    num_clean: int
    num_drifted: int
    num_matched: int

    @property
    def lost(self) -> float:
        """What the drift costs the model at work, without the sums' own rounding."""
        return round(self.matched_before - self.drifted_before, 12)

    @property
    def recovered(self) -> float:
        """Share of it that the new model wins back."""
        return (self.drifted_after - self.drifted_before) / self.lost

    @property
    def clean_loss(self) -> float:
        """What the new model loses on clean images."""
        return self.clean_before - self.clean_after


class Trial:
    """What a model is judged on: the clean validation images, and the held-out drifted ones."""

    def __init__(self, images: LabelledSet, params: Params) -> None:
        """Decode the held-out images as preprocess does; InputError names one that cannot be decoded."""
        meta = load_meta()
        packed = load_split("val", meta)
        check_images(packed)
        rows = np.flatnonzero([not is_extra(name) for name in load_file_names("val")])
        held_out = [image for image in images.images if image.split == "val"]
        knobs = params.preprocess
        geometry = Geometry(knobs.image_size, knobs.crop_mode, knobs.interpolation)
        pixels = np.empty((len(held_out), *packed.images.shape[1:]), dtype=np.uint8)
        for row, image in zip(pixels, held_out, strict=True):
            name = f"{images.origin}: {image.class_name}/{image.file_name}"
            row[:] = decode(image.read(), name, *geometry)
        labels = [meta.class_ids.index(image.class_name) for image in held_out]
        self.clean = Split(packed.images[rows], packed.labels[rows])
        if missing := set(labels) - {*self.clean.labels.tolist()}:
            names = ", ".join(meta.class_ids[label] for label in sorted(missing))
            raise InputError(
                f"data/processed: no clean validation image of {names} is left (preprocess.on_bad_image?), so what "
                "drift costs this class cannot be told; mend data.source, or leave the class out of --labels"
            )
        self.drifted = Split(pixels, np.array(labels, dtype=np.int64))
        self._params = params
        self._right: list[Right] = []

    def ask(self, classifier: Path) -> None:
        """Let a saved classifier predict the clean images and the drifted ones: the model at work, then the new one."""
        where = device.set_up(self._params.runtime)
        policy = precision.resolve(self._params.evaluate.precision, where, key="evaluate.precision")
        network, spec = model.load(classifier, where)
        right = []
        for split in (self.clean, self.drifted):
            source = open_source(split, where, False, 0)
            batches = evaluation_batches(
                source, spec.mean, spec.std, spec.image_size, self._params.evaluate.batch_size, policy.dtype
            )
            predicted = inference.predict(network, batches, policy).argmax(dim=1)
            right.append(predicted.numpy() == split.labels)
        self._right.append((right[0], right[1]))

    def accuracies(self) -> Accuracies:
        """Of the models that were asked; as long as it is one, the new one is the same."""
        return count(self.clean.labels, self.drifted.labels, self._right[0], self._right[-1])


def count(
    clean_labels: NDArray[np.int64], drifted_labels: NDArray[np.int64], before: Right, after: Right
) -> Accuracies:
    """The accuracies, of which images of either kind the model at work and the new one have right."""
    classes, counts = np.unique(drifted_labels, return_counts=True)
    shares = counts / counts.sum()
    by_class = [before[0][clean_labels == label] for label in classes]
    return Accuracies(
        clean_before=float(before[0].mean()),
        clean_after=float(after[0].mean()),
        drifted_before=float(before[1].mean()),
        drifted_after=float(after[1].mean()),
        matched_before=float(shares @ [right.mean() for right in by_class]),
        num_clean=len(clean_labels),
        num_drifted=len(drifted_labels),
        num_matched=round(1 / float(shares**2 @ [1 / len(right) for right in by_class])),
    )


def no_damage(found: Accuracies) -> str | None:
    """Why the held-out images do not show that drift does harm, so that nothing can be proved with them; or None."""
    drifted, clean = (
        f"{found.drifted_before:.4f} on the {found.num_drifted:,} held-out ones",
        f"{found.matched_before:.4f}",
    )
    if found.lost <= 0:
        return (
            f"the labelled images show no damage: top-1 is {drifted} and {clean} on clean images of the same "
            "classes; they are not what production sees, or the alarm was false"
        )
    right = (round(found.drifted_before * found.num_drifted), round(found.matched_before * found.num_matched))
    wrong = (found.num_drifted - right[0], found.num_matched - right[1])
    chance = float(stats.fisher_exact([[right[0], wrong[0]], [right[1], wrong[1]]], alternative="less").pvalue)
    if chance > _CHANCE:
        return (
            f"the labelled images do not show damage: top-1 is {drifted} and {clean} on clean images of the same "
            f"classes, which may be chance (p = {chance:.2f}, Fisher's exact test); label more images"
        )
    return None


def doubt(confirmation: dict[str, Any]) -> str | None:
    """Why the monitor's verdict with the new model forbids to promote it, or None.

    Only where even the upper end of the estimate's interval is harm: the labelled images have told how good the model
    is, and what is asked here is whether they are of the kind that production sees.
    """
    _, high = confirmation["interval"]
    limit = confirmation["clean_accuracy"] - confirmation["max_drop"]
    if confirmation["status"] == "harmful" and high < limit:
        return "the monitor still calls the drift harmful with the new model and its reference"
    return None


def objection(found: Accuracies, params: RetrainParams) -> str | None:
    """Why the new model must not be promoted, or None."""
    reasons = []
    if found.recovered < params.min_recovered - _ROUNDING:
        reasons.append(
            f"{found.recovered:.0%} of the lost accuracy came back ({found.drifted_before:.4f} to "
            f"{found.drifted_after:.4f} on held-out drifted images); retrain.min_recovered asks for "
            f"{params.min_recovered:.0%}"
        )
    if found.clean_loss > params.max_clean_loss + _ROUNDING:
        reasons.append(
            f"clean top-1 fell by {found.clean_loss:.4f} ({found.clean_before:.4f} to {found.clean_after:.4f}); "
            f"retrain.max_clean_loss allows {params.max_clean_loss:g}"
        )
    return "; ".join(reasons) or None
