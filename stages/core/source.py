"""What extract hands to preprocess: one uncompressed tar a split, and the facts about the whole.

data/raw/
    {train,val}.tar   members `<class>/<image>` in canonical order, without times or owners; those of `data.extra` come
                      after those of `data.source`, as `<class>/extra-<image>`
    source.json       SourceInfo
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from stages.core.errors import InputError
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
