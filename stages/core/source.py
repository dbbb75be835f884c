"""What extract hands to preprocess: one uncompressed tar a split, and the facts about the whole.

data/raw/
    {train,val}.tar   members `<class>/<image>` in canonical order, without times or owners; those of `data.extra` come
                      after those of `data.source`, as `<class>/extra-<image>`
    source.json       SourceInfo
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import ValidationError

from stages.core.errors import InputError
from stages.core.output import sha256_of
from stages.core.params import Section

RAW = Path("data/raw")
SPLITS = ("train", "val")
EXTRA_PREFIX = "extra-"  # of the file names of images that `data.extra` adds


def is_extra(name: str) -> bool:
    """Whether an image `<class>/<image>` (a member of a tar, a name in files.json) came with `data.extra`."""
    return name.rsplit("/", 1)[-1].startswith(EXTRA_PREFIX)


class ExtraInfo(Section):
    """What `data.extra` added."""

    num_images: dict[str, int]  # by split
    sha256: str  # of the content: the same images give the same, from a folder or an archive


class SourceInfo(Section):
    """source.json of an extracted set."""

    classes: list[str]  # folder names, sorted
    num_images: dict[str, int]  # by split, with those of `extra`
    sha256: str  # of the content: the same images give the same, from a folder or an archive
    extra: ExtraInfo | None = None  # absent from the file without `data.extra`


def load_source_info(folder: Path = RAW) -> SourceInfo:
    """Read source.json; InputError when it is missing or not what extract writes."""
    path = folder / "source.json"
    try:
        return SourceInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run `dvc repro extract` (or `dvc checkout`)") from None
    except ValidationError as error:
        raise InputError(f"{path}: not written by this version; run `dvc repro extract`: {error}") from None


def content_hash(folder: Path = RAW) -> str:
    """sha256 of the tars, as source.json has it. FileNotFoundError without them."""
    digests = [sha256_of(folder / f"{split}.tar") for split in SPLITS]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_content(info: SourceInfo, folder: Path = RAW) -> None:
    """InputError when the tars are not those that extract wrote: DVC takes an altered cache entry without a word."""
    try:
        found = content_hash(folder)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: not found; run `dvc repro extract` (or `dvc checkout`)") from None
    if found != info.sha256:
        raise InputError(
            f"{folder}: altered since extract wrote it (sha256 {found}, not {info.sha256}); run `dvc repro extract`; "
            "when it says that nothing changed, `dvc repro --force extract`: DVC's cache is damaged"
        )
