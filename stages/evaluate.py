"""Stage evaluate: how good is the classifier on the validation images, how well calibrated, and where is it wrong?

Inputs   models/classifier/, data/processed/; params `evaluate`
Outputs  metrics/evaluate.json   top1, macro_f1, nll, ece
         plots/evaluate/         confusion, reliability, precision-recall and per-class tables, and pictures of them
Command  python -m stages.evaluate
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.core.errors import InputError, ran_out_of_memory
from stages.core.mirror import WandbParams, open_mirror
from stages.core.params import Section, load_params
from stages.core.recipe import Precision
from stages.core.runtime import RuntimeParams, cache_dir, num_readers
from stages.core.stopping import run_stage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METRICS = Path("metrics/evaluate.json")
PLOTS = Path("plots/evaluate")


class EvaluateParams(Section):
    """The `evaluate` section of params.yaml."""

    batch_size: Annotated[int, Field(ge=1)]
    precision: Precision
    num_bins: Annotated[int, Field(ge=2, le=100)]
    num_mistakes: Annotated[int, Field(ge=1, le=100)]


class Params(Section):
    """What this stage reads."""

    evaluate: EvaluateParams
    runtime: RuntimeParams
    wandb: WandbParams


def main(params: Params) -> None:
    """Predict the validation split, write metrics/evaluate.json and plots/evaluate/."""
    import numpy as np
    import torch

    from stages.core import device, figures, inference, metrics, model, precision
    from stages.core.dataset import load_meta, load_split
    from stages.core.loader import evaluation_batches, open_source
    from stages.core.output import write_bytes, write_json, write_text
    from stages.core.progress import progress, stage_summary
    from stages.core.tables import as_csv

    meta = load_meta()
    split = load_split("val", meta)
    where = device.set_up(params.runtime)
    policy = precision.resolve(params.evaluate.precision, where, key="evaluate.precision")
    network, spec = model.load(model.CLASSIFIER, where)
    if spec.class_ids != meta.class_ids:
        raise InputError(
            f"{model.CLASSIFIER} was trained on other classes than {len(meta.classes)} in data/processed "
            f"({', '.join(meta.class_ids[:3])}, ...); run `dvc repro`"
        )
    mirrored = open_mirror("evaluate", params.wandb, cache_dir(params.runtime), params, model=model.CLASSIFIER)
    with stage_summary("evaluate") as made, mirrored as mirror:
        batch_size = params.evaluate.batch_size
        source = open_source(split, where, params.runtime.resident, num_readers(params.runtime))
        batches = evaluation_batches(source, spec.mean, spec.std, spec.image_size, batch_size, policy.dtype)
        num_batches = -(-len(split.labels) // batch_size)
        try:
            logits = inference.predict(network, progress(batches, "evaluate", num_batches, "batch"), policy)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise InputError(
                f"params.yaml: evaluate.batch_size: {batch_size}: out of memory on {where} with images of "
                f"{spec.image_size} px: use a smaller one, or set runtime.resident to false"
            ) from None
        probabilities: NDArray[np.float64] = torch.softmax(logits.double(), dim=1).numpy()
        if not np.isfinite(probabilities).all():
            raise InputError(f"{model.CLASSIFIER}: its outputs are not finite: the training run diverged")
        predicted = probabilities.argmax(axis=1)

        results = metrics.summary(probabilities, split.labels, params.evaluate.num_bins)
        reliability = metrics.reliability(probabilities, split.labels, params.evaluate.num_bins)
        counts = np.zeros((len(spec.classes), len(spec.classes)), dtype=np.int64)
        np.add.at(counts, (split.labels, predicted), 1)
        worst = _most_confident_mistakes(probabilities, split.labels, params.evaluate.num_mistakes)
        names = figures.labels(spec.classes)
        captions = [f"{names[split.labels[i]]}\nas {names[predicted[i]]} {probabilities[i].max():.0%}" for i in worst]

        pairs = [
            {"actual": spec.classes[a], "predicted": spec.classes[p]}
            for a, p in zip(split.labels, predicted, strict=True)
        ]
        write_text(PLOTS / "confusion.csv", as_csv(pairs))
        write_bytes(PLOTS / "confusion.png", figures.confusion_matrix(counts, spec.classes))
        write_json(PLOTS / "reliability.json", reliability)
        write_bytes(PLOTS / "reliability.png", figures.reliability_diagram(reliability, results["ece"]))
        write_json(PLOTS / "precision_recall.json", metrics.precision_recall(probabilities, split.labels))
        write_text(PLOTS / "per_class.csv", as_csv(metrics.per_class(probabilities, split.labels, spec.classes)))
        write_bytes(PLOTS / "mistakes.png", figures.mistakes(split.images[worst], captions))
        write_json(METRICS, results | {"num_images": len(split.labels)})
        mirror.results(METRICS, PLOTS)
        made.append(", ".join(f"{name} {value:.4f}" for name, value in results.items()))
        made.append(f"{(predicted != split.labels).sum()} mistakes in {len(split.labels):,} images")


def _most_confident_mistakes(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Indices of the wrong predictions, the most confident first, ties in the images' order."""
    import numpy as np

    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    order = np.argsort(-probabilities[wrong].max(axis=1), kind="stable")
    return wrong[order][:count]


if __name__ == "__main__":
    run_stage(lambda: main(load_params(Params)), "evaluate")
