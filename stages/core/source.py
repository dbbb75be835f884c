"""What extract hands to preprocess: one uncompressed tar a split, and the facts about the whole.

data/raw/
    {train,val}.tar   members `<class>/<image>` in canonical order, without times or owners
    source.json       SourceInfo
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from stages.core.errors import InputError
from stages.core.params import Section

RAW = Path("data/raw")
SPLITS = ("train", "val")


class SourceInfo(Section):
    """source.json of an extracted set."""

    classes: list[str]  # folder names, sorted
    num_images: dict[str, int]  # by split
    sha256: str  # of the content: the same images give the same, from a folder or an archive


def load_source_info(folder: Path = RAW) -> SourceInfo:
    """Read source.json; InputError when it is missing or not what extract writes."""
    path = folder / "source.json"
    try:
        return SourceInfo.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run `dvc repro extract` (or `dvc checkout`)") from None
    except ValidationError as error:
        raise InputError(f"{path}: not written by this version; run `dvc repro extract`: {error}") from None
