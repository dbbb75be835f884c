"""Which class do images show? The exported model answers, by onnxruntime alone; PyTorch is not imported.

    python -m tools.predict IMAGES...               folders, archives, image files, patterns ('shots/**/*.jpg')
    find shots -name '*.png' | python -m tools.predict -      paths, one a line
    python -m tools.predict IMAGES --format json --top 3 --output predictions.json
    python -m tools.predict IMAGES --model prod     the model that is in stage prod; also v0.0.1, an experiment, a path
    python -m tools.predict IMAGES --monitor        and has what they show drifted?

Exit status: 0 all were predicted, 1 some were left out (named on stderr), 2 error, none was predicted. With --monitor:
10 benign drift, 20 harmful drift, 2 no verdict.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core import onnx_model
from stages.core.errors import InputError
from stages.core.parallel import read_ahead
from stages.core.production import (
    ImageFile,
    Window,
    find_images,
    is_image_name,
    lines_of_stdin,
    printable,
    read_images,
)
from stages.core.runtime import num_cpus
from tools.predict.formats import FORMATS, Guess, Prediction
from tools.shared.arguments import at_least, close_stdout, output_file, write_output
from tools.shared.process import run_tool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".npy")


class _LeftOut:
    """Counts what cannot be predicted, and tells of it at once."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        reason = reason.splitlines()[0].rstrip(":") if reason else "cannot be read"
        print(f"predict: left out: {printable(f'{name}: {reason}')}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict images, write what was found, and return the exit status."""
    options = _parser().parse_args(arguments)
    folder = find_model(options.model)
    model = onnx_model.load(folder, options.threads)
    if options.top > len(model.spec.classes):
        raise InputError(f"--top: {options.top} is more than the {len(model.spec.classes)} classes of {folder}")
    left_out = _LeftOut()
    if not options.monitor:
        _run(model, options, left_out, None)
        return int(left_out.count > 0)
    from tools.predict.monitor import Monitored

    with Monitored(model.spec.image_size) as monitored:
        _run(model, options, left_out, monitored.add)
        return monitored.judge(folder, options.model) or int(left_out.count > 0)


def find_model(name: str) -> Path:
    """The folder of a model: a path (of the folder or its model.onnx), or the name of a registered one or revision."""
    path = Path(name)
    if path.name == "model.onnx":
        return path.parent
    if path == onnx_model.ONNX or (path / "model.json").is_file():
        return path
    from tools.registry.revision import model_folder  # asks git, and dvc the first time

    try:
        return model_folder(name)
    except InputError as error:
        raise InputError(f"--model: {name!r} is no folder with an exported model; {error}") from None


def find_files(places: Iterable[str], tell: Callable[[str, str], None]) -> Iterator[ImageFile]:
    """The images of folders, archives, files, patterns and, for `-`, of paths on standard input; in this order.

    A place without images, or that is not there, is told of (name, reason) and left out.
    """
    for place in places:
        if place == "-":
            for name in lines_of_stdin():
                yield ImageFile(name, Path(name).read_bytes)
            continue
        for expanded in [place] if os.path.lexists(place) else _expand(place):
            try:
                yield from find_images([expanded])
            except InputError as error:
                tell(expanded, str(error).removeprefix(f"{expanded}: "))
            except OSError as error:
                tell(expanded, error.strerror or str(error))


def _expand(place: str) -> list[str]:
    """What a pattern stands for, of folders, images and archives; anything else stands for itself."""
    found = sorted(glob.glob(place, recursive=True))  # noqa: PTH207  # of absolute patterns, too
    folders = "**" in place  # which stands for folders on the way, whose files it finds itself
    some = [
        name
        for name in found
        if (Path(name).is_dir() and not folders) or is_image_name(Path(name).name) or name.endswith(_ARCHIVES)
    ]
    return some or [place]


def _predict(
    model: onnx_model.OnnxModel,
    options: argparse.Namespace,
    left_out: _LeftOut,
    keep: Callable[[Window], None] | None,
) -> Iterator[Prediction]:
    """Predictions in the order of the images; threads decode the next batches meanwhile."""
    spec = model.spec
    files = find_files(options.images, left_out.add)
    batches = iter(lambda: list(islice(files, options.batch)), [])
    decode = partial(read_images, size=spec.image_size, crop_mode=spec.crop_mode, interpolation=spec.interpolation)
    for window in read_ahead(decode, batches, options.threads):
        for name, reason in window.skipped:
            left_out.add(name, reason)
        if not window.names:
            continue
        if keep:
            keep(window)
        for name, shares in zip(window.names, model.probabilities(window.images), strict=True):
            yield Prediction(name, _best(shares, spec.classes, options.top))


def _run(
    model: onnx_model.OnnxModel, options: argparse.Namespace, left_out: _LeftOut, keep: Callable[[Window], None] | None
) -> None:
    """Predict and write all; InputError where there is nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; a filter of each thread's own would be lost
        predictions = _predict(model, options, left_out, keep)
        first = next(predictions, None)
        if first is None:
            reasons = "for the reasons above" if left_out.count else "standard input named none"
            raise InputError(f"no image was predicted, {reasons}")
        _write(FORMATS[_format(options)](_chain(first, predictions)), options.output)


def _best(shares: NDArray[np.float64], classes: list[str], count: int) -> list[Guess]:
    order = (-shares).argsort(kind="stable")[:count]
    return [Guess(classes[label], float(shares[label])) for label in order]


def _chain(first: Prediction, others: Iterator[Prediction]) -> Iterator[Prediction]:
    yield first
    yield from others


def _format(options: argparse.Namespace) -> str:
    by_name = options.output.suffix[1:] if options.output else ""
    return options.format or (by_name if by_name in FORMATS else "csv")


def _write(pieces: Iterator[str], path: Path | None) -> None:
    """Print pieces as they come; or write them to a file that appears whole or not at all."""
    if path:
        write_output("--output", path, "".join(pieces))
        return
    for piece in pieces:
        _print(piece)


def _print(text: str) -> None:
    """Print text; InputError where standard output takes no more."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        close_stdout()
        raise InputError(f"standard output: {error.strerror}; what it has is cut off") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="exit status: 0 all predicted, 1 some left out, 2 error; with --monitor 10 benign, 20 harmful drift",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folder, archive, file, pattern; - reads paths")
    parser.add_argument("--model", default=str(onnx_model.ONNX), metavar="NAME", help="path, stage, version, revision")
    parser.add_argument("--format", choices=FORMATS, help="csv, unless --output ends in .json")
    parser.add_argument("--output", type=output_file, metavar="FILE", help="write to a file instead of standard output")
    parser.add_argument("--top", type=at_least(1), default=1, metavar="K", help="classes an image (1)")
    parser.add_argument(
        "--batch", type=at_least(1), default=64, metavar="N", help="images that are computed at once (64)"
    )
    parser.add_argument("--threads", type=at_least(1), default=num_cpus(), metavar="N", help="CPU threads (all)")
    parser.add_argument("--monitor", action="store_true", help="ask the drift monitor about the same images")
    return parser


def _main() -> int:
    try:
        return main()
    except BrokenPipeError:  # the reader has enough: `| head`
        close_stdout()
        return 0


def run() -> None:
    """The body of the process."""
    run_tool(_main, "predict")
