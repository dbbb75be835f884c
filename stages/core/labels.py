"""Readable names of classes whose folders are WordNet ids (Imagenette, Imagewoof)."""

from __future__ import annotations

# https://github.com/fastai/imagenette
WORDNET_NAMES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
    "n02086240": "Shih-Tzu",
    "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle",
    "n02089973": "English foxhound",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
    "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog",
    "n02111889": "Samoyed",
    "n02115641": "dingo",
}


def readable(class_id: str) -> str:
    """The name to show for a class folder: its WordNet name where known, else the folder's own."""
    return WORDNET_NAMES.get(class_id, class_id)
