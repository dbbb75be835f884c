"""What tools.predict is measured against: the same predictions by PyTorch and timm, on the CPU.

    python -m tools.benchmark.torch_predict IMAGES... [--precision bf16]

Images are found, decoded and handed over in the same way; only what computes is another.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import islice

from stages.core.errors import run_main


def main() -> None:
    """Print predictions as CSV."""
    import numpy as np
    import torch

    from stages.core import inference, model, onnx_model, precision
    from stages.core.dataset import Split
    from stages.core.loader import evaluation_batches, open_source
    from stages.core.parallel import read_ahead
    from stages.core.production import find_images, read_images
    from tools.predict.formats import Guess, Prediction, as_csv

    options = _parse()
    torch.set_num_threads(options.threads)
    where = torch.device("cpu")
    policy = precision.resolve(options.precision, where)
    network, spec = model.load(model.CLASSIFIER, where)
    packing = onnx_model.load_spec()
    files = iter(find_images(options.images))
    batches = iter(lambda: list(islice(files, options.batch)), [])
    decode = partial(
        read_images, size=packing.image_size, crop_mode=packing.crop_mode, interpolation=packing.interpolation
    )
    predictions = []
    for window in read_ahead(decode, batches, options.threads):
        source = open_source(Split(window.images, np.zeros(len(window.images), dtype=np.int64)), where, False, 0)
        inputs = evaluation_batches(source, spec.mean, spec.std, spec.image_size, options.batch, policy.dtype)
        shares = torch.softmax(inference.predict(network, inputs, policy).double(), dim=1)
        for name, row in zip(window.names, shares, strict=True):
            label = int(row.argmax())
            predictions.append(Prediction(name, [Guess(spec.classes[label], float(row[label]))]))
    sys.stdout.writelines(as_csv(predictions))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark.torch_predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folder, archive or file")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=64, metavar="N")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main, "torch_predict")
