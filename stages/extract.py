"""Stage extract: get the images of `data.source`, check them, and hand them on as one tar a split.

Inputs   params `data`, `sample`; the generator, a download, an archive or a folder
Outputs  data/raw/{train,val}.tar   uncompressed, members `<class>/<image>` in canonical order, no times, no owners;
                                    then those of `data.extra`, as `<class>/extra-<image>`
         data/raw/source.json       classes, counts, sha256 of the content
Command  python -m stages.extract
"""

# Of os.path, not of Path, which raises for a home that nobody has, and for a name that is too long (a signed URL).
# ruff: noqa: PTH111, PTH112, PTH113

from __future__ import annotations

import difflib
import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.core import sample
from stages.core.archive import LabelledFile, Limits, open_image_set
from stages.core.download import check, fetch
from stages.core.errors import DamagedError, InputError, where_dvc_has_it
from stages.core.image import check_is_image
from stages.core.output import replace_directory, write_json
from stages.core.parallel import parallel_map
from stages.core.params import Section, load_params
from stages.core.progress import progress, stage_summary
from stages.core.runtime import RuntimeParams, cache_dir, num_workers
from stages.core.source import EXTRA_PREFIX, RAW, SPLITS, ExtraInfo, SourceInfo, content_hash, is_extra
from stages.core.stopping import run_stage

# fast.ai's addresses and md5; those of Imagenette are torchvision's too (torchvision.datasets.Imagenette).
_MOST_NAMES = 10  # in a message
_FAST_AI = "https://s3.amazonaws.com/fast-ai-imageclas/"
NAMED_SOURCES = {
    "imagenette2-160": (_FAST_AI + "imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412"),
    "imagenette2-320": (_FAST_AI + "imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3"),
    "imagenette2": (_FAST_AI + "imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612"),
    "imagewoof2-160": (_FAST_AI + "imagewoof2-160.tgz", "3d200a7be99704a0d7509be2a9fbfe15"),
}

# (class, file name, encoded image)
LabelledImage = tuple[str, str, bytes]


class DataParams(Section):
    """The `data` section of params.yaml."""

    source: Annotated[str, Field(min_length=1)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None
    extra: Annotated[str, Field(min_length=1)] | None
    extra_sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")] | None
    max_files: Annotated[int, Field(ge=1)]
    max_bytes: Annotated[int, Field(ge=1)]
    max_ratio: Annotated[int, Field(ge=1)]


class SampleParams(Section):
    """The `sample` section of params.yaml."""

    train_images: Annotated[int, Field(ge=len(sample.CLASSES))]
    val_images: Annotated[int, Field(ge=len(sample.CLASSES))]
    image_size: Annotated[int, Field(ge=16, le=512)]
    seed: Annotated[int, Field(ge=0)]


class Params(Section):
    """What this stage reads."""

    data: DataParams
    sample: SampleParams
    runtime: RuntimeParams


def main(params: Params) -> None:
    """Write data/raw/ from `data.source` and `data.extra`, or leave it as it was and raise InputError."""
    with stage_summary("extract") as made, replace_directory(RAW) as out:
        extra, copies = None, _Copies()
        with ExitStack() as stack:
            source = stack.enter_context(_open_source(params, out))
            further = stack.enter_context(_open_extra(params, source, out))
            counts = source.counts
            for split in SPLITS:
                _write_tar(out / f"{split}.tar", source.images[split], split, source.counts[split], copies)
                _refuse_prefix(out / f"{split}.tar", split)
            found = content_hash(out)
            if params.data.source == "sample" or _is_folder(params.data.source):
                _check_content(params.data, found)
            if further is not None:
                extra = _add_extra(params.data, further, out, copies)
                counts = {split: counts[split] + extra.num_images[split] for split in SPLITS}
                found = content_hash(out)
        info = SourceInfo(classes=source.classes, num_images=counts, sha256=found, extra=extra)
        write_json(out / "source.json", info.model_dump(exclude_none=True))
        for line in copies.remarks():
            print(f"extract: {params.data.source}: {line}", file=sys.stderr)
        shown = " + ".join(f"{counts[split]:,} {split}" for split in SPLITS)
        added = f", {sum(extra.num_images.values()):,} of them from {params.data.extra}," if extra else ""
        made.append(f"{shown} images of {len(source.classes)} classes from {params.data.source}{added} in {RAW}")


@dataclass(frozen=True)
class _Source:
    """An opened source: its classes, and by split the number of images and the images in canonical order."""

    classes: list[str]
    counts: dict[str, int]
    images: dict[str, Iterable[LabelledImage]]


class _Copies:
    """Images that are the same file, and should not be: on both sides, or of two classes."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}  # name by hash of the content
        self._across: list[str] = []
        self._contradicting: list[str] = []

    def note(self, name: str, content: bytes) -> None:
        """Look at an image, `<split>/<class>/<image>`."""
        first = self._first.setdefault(hashlib.sha256(content).digest()[:16], name)
        (split, class_name, _), (first_split, first_class, _) = name.split("/"), first.split("/")
        if split != first_split:
            self._across.append(f"{name} is {first}")
        if class_name != first_class:
            self._contradicting.append(f"{name} is {first}")

    def remarks(self) -> Iterator[str]:
        """A line on each kind of them."""
        if found := self._across:
            yield (
                f"{_images_are(len(found))} in train and in val ({_some(found)}): accuracy is in part measured on what "
                "was trained on; keep each on one side"
            )
        if found := self._contradicting:
            yield f"{_images_are(len(found))} in two classes ({_some(found)}): only one label can be right"


@contextmanager
def _open_source(params: Params, scratch: Path) -> Iterator[_Source]:
    data = params.data
    if data.source == "sample":
        yield _generate(params.sample, num_workers(params.runtime))
        return
    path = _locate(data.source, "source", data.md5, data.sha256, cache_dir(params.runtime) / "downloads")
    with _opened(path, data.source, _limits(data), scratch, None) as source:
        yield source


@contextmanager
def _open_extra(params: Params, source: _Source, scratch: Path) -> Iterator[_Source | None]:
    """The set of `data.extra`, or None without one."""
    data = params.data
    if data.extra is None:
        if data.extra_sha256 is not None:
            raise InputError("params.yaml: data.extra_sha256: there is no data.extra; set it, or this to null")
        yield None
        return
    path = _locate(data.extra, "extra", None, data.extra_sha256, cache_dir(params.runtime) / "downloads")
    folder = scratch / "extra"
    folder.mkdir()
    with _opened(path, data.extra, _limits(data), folder, source.classes) as extra:
        yield extra
    folder.rmdir()


@contextmanager
def _removed_if_damaged(path: Path, value: str) -> Iterator[None]:
    """A download that proves to be no archive (a page that asks for a password) must not be kept for the next run."""
    try:
        yield
    except DamagedError as error:
        if not _is_download(value):
            raise
        path.unlink(missing_ok=True)
        raise InputError(f"{error}: the next run does, this copy is removed") from None


@contextmanager
def _opened(path: Path, value: str, limits: Limits, scratch: Path, classes: list[str] | None) -> Iterator[_Source]:
    """The set in `path`, which is where the param's `value` led to."""

    def read(file: LabelledFile) -> LabelledImage:
        with _removed_if_damaged(path, value):
            return file.class_name, file.file_name, file.member.read()

    with ExitStack() as stack:
        with _removed_if_damaged(path, value):
            files = stack.enter_context(open_image_set(path, limits, scratch, classes))
        yield _Source(
            classes=classes or sorted({file.class_name for file in files["train"]}),
            counts={split: len(files[split]) for split in SPLITS},
            images={split: map(read, files[split]) for split in SPLITS},
        )


def _limits(data: DataParams) -> Limits:
    return Limits(files=data.max_files, total_bytes=data.max_bytes, ratio=data.max_ratio)


def _add_extra(data: DataParams, extra: _Source, out: Path, copies: _Copies) -> ExtraInfo:
    """Append the images of `data.extra` to the tars."""
    digest = hashlib.sha256()

    def renamed(split: str) -> Iterator[LabelledImage]:
        for class_name, file_name, content in extra.images[split]:
            digest.update(f"{split}/{class_name}/{file_name}\0".encode() + hashlib.sha256(content).digest())
            yield class_name, f"{EXTRA_PREFIX}{file_name}", content

    for split in SPLITS:
        tar = out / f"{split}.tar"
        _write_tar(tar, renamed(split), split, extra.counts[split], copies, mode="a")
    found = digest.hexdigest()
    if _is_folder(data.extra or "") and data.extra_sha256 and data.extra_sha256.lower() != found:
        raise InputError(f"{data.extra}: content sha256 is {found}, expected {data.extra_sha256} (data.extra_sha256)")
    return ExtraInfo(num_images=extra.counts, sha256=found)


def _refuse_prefix(tar_path: Path, split: str) -> None:
    """A name of the source must not look like one of `data.extra`: images are told apart by it."""
    with tarfile.open(tar_path, "r:") as tar:
        for info in tar:
            if is_extra(info.name):
                raise InputError(
                    f"{split}/{info.name}: no image of data.source may be named {EXTRA_PREFIX}*, as those of "
                    "data.extra are: rename it"
                )


def _generate(params: SampleParams, workers: int) -> _Source:
    counts = {"train": params.train_images, "val": params.val_images}

    def images(split_number: int, count: int) -> Iterator[LabelledImage]:
        # class by class, so that the order is that of an archive
        num_classes = len(sample.CLASSES)
        indices = [i for label in range(num_classes) for i in range(label, count, num_classes)]
        render = partial(sample.render, params.seed, split_number, size=params.image_size)
        for index, image in zip(indices, parallel_map(render, indices, workers), strict=True):
            yield sample.CLASSES[index % num_classes], f"{index:05d}.jpg", image

    return _Source(
        classes=list(sample.CLASSES),
        counts=counts,
        images={split: images(number, counts[split]) for number, split in enumerate(SPLITS)},
    )


def _locate(value: str, key: str, md5: str | None, sha256: str | None, downloads: Path) -> Path:
    """The local folder or archive behind `data.KEY`, downloaded where it has to be, its checksum checked."""
    key_prefix = "data." if key == "source" else f"data.{key}_"
    if _is_download(value):
        url, published = NAMED_SOURCES.get(value, (value, None))
        return fetch(url, downloads, md5=md5 or published, sha256=sha256, key_prefix=key_prefix)
    path = _path(value)
    if os.path.isdir(path):
        return path  # its checksum is that of the content, known when it has been read
    if os.path.isfile(path):
        check(path, md5=md5, sha256=sha256, key_prefix=key_prefix)
        return path
    if kept := where_dvc_has_it(path):
        raise InputError(f"params.yaml: data.{key}: {value!r} is not here{kept}")
    names = ("sample", *NAMED_SOURCES) if key == "source" else tuple(NAMED_SOURCES)
    close = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise InputError(
        f"params.yaml: data.{key}: {value!r} is no file or folder here{hint} (valid: {', '.join(names)}, or "
        "the path or URL of a .tgz, .tar, .zip or folder with train/<class>/* and val/<class>/*)"
    )


def _is_download(value: str) -> bool:
    return value in NAMED_SOURCES or value.startswith(("http://", "https://"))


def _is_folder(value: str) -> bool:
    return not _is_download(value) and os.path.isdir(_path(value))


def _path(value: str) -> Path:
    return Path(os.path.expanduser(value))


def _check_content(data: DataParams, found: str) -> None:
    if data.md5:
        what = "the sample" if data.source == "sample" else "a folder"
        raise InputError(f"params.yaml: data.md5: {what} has none; use data.sha256, the content hash in source.json")
    if data.sha256 and data.sha256.lower() != found:
        raise InputError(f"{data.source}: content sha256 is {found}, expected {data.sha256.lower()} (data.sha256)")


def _write_tar(
    path: Path,
    images: Iterable[LabelledImage],
    split: str,
    total: int,
    copies: _Copies,
    mode: Literal["w", "a"] = "w",
) -> None:
    """Write (or append) the images in the order given; the same images give the same bytes.

    Raises InputError, which names the first few, where files are no images.
    """
    reason, refused = "", []
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as tar:
        for class_name, file_name, content in progress(images, f"extract {split}", total):
            name = f"{split}/{class_name}/{file_name}"
            try:
                check_is_image(content, name)
            except InputError as error:
                reason = reason or str(error)
                refused.append(name)
                continue
            copies.note(name, content)
            info = tarfile.TarInfo(f"{class_name}/{file_name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
    if refused:
        others = refused[1:]
        more = f" and {len(others):,} more of the kind ({_some(others)})" if others else ""
        raise InputError(f"{reason}; remove it{more}: preprocess.on_bad_image is for damage further in")


def _images_are(count: int) -> str:
    return "1 image is" if count == 1 else f"{count:,} images are"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")


if __name__ == "__main__":
    run_stage(lambda: main(load_params(Params)), "extract")
