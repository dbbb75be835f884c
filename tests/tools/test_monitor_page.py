"""The monitor's page: whole, alone, and safe whatever the files are called."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers import picture
from tools.monitor.page import page

PICTURES = [np.asarray(picture(seed, (20, 20))) for seed in range(2)]
EVIL = "<script>alert('x')</script>\"&.png"
VOID = {"meta", "img", "br"}


def report(**changes: Any) -> dict[str, Any]:
    return {
        "status": "harmful",
        "num_images": 40,
        "num_tested": 30,
        "listed": 0,
        "copies": {"number": 0, "left_out": False},
        "p_value": 0.0025,
        "alpha": 0.01,
        "estimated_accuracy": 0.61,
        "interval": [0.55, 0.67],
        "clean_accuracy": 0.9,
        "max_drop": 0.05,
        "label_shift": {"detected": True, "p_value": 0.003, "accounted_for": True},
        "moved": [
            {"measure": "colour_noise", "shift": 1.5, "evidence": 12.25},
            {"measure": "haze", "shift": -0.25, "evidence": 0.5},
        ],
        "images": [
            {"path": EVIL, "predicted": "<b>cat</b>", "oddness": 4.44},
            {"path": "b.png", "predicted": "dog", "oddness": 1.0},
        ],
        "skipped": [{"path": EVIL, "reason": "it starts with '<html>'"}],
    } | changes


class Reader(HTMLParser):
    """Tags in their order, attributes, and text; fails on a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("status", ["ok", "benign", "harmful"])
def test_the_page_is_whole_and_says_the_verdict(status: str) -> None:
    found = read(page(report(status=status), PICTURES))
    assert f"Drift report: {status}" in found.text
    facts = ("40, of which 30", "0.0025", "alarm at 0.01", "61.0% (95 %: 55.0% to 67.0%)", "90.0%", "5.0%")
    rows = ("label shift), p = 0.0030", "colour noise", "+1.50", "-0.25", "12.2", "oddness 4.4", "dog")
    for said in (*facts, *rows):
        assert said in found.text, said


def test_it_needs_nothing_beside_it() -> None:
    text = page(report(), PICTURES)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    found = read(text)
    assert not {"script", "link", "iframe", "object", "a"} & set(found.tags)
    sources = [value for name, value in found.attributes if name in ("src", "href", "srcset")]
    assert len(sources) == 2
    for source, pixels in zip(sources, PICTURES, strict=True):
        kind, content = source.split(",")
        assert kind == "data:image/jpeg;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), dtype=np.float64)
        assert shown.shape == pixels.shape
        assert np.abs(shown - pixels).mean() < 8


def test_names_are_text_and_never_markup() -> None:
    found = read(page(report(), PICTURES))
    assert "script" not in found.tags
    assert found.tags.count("b") == 1, "that of the estimate"
    assert EVIL in found.text
    assert ("title", EVIL) in found.attributes
    assert "<b>cat</b>" in found.text
    assert "it starts with '<html>'" in found.text
    assert not any(name.startswith("on") for name, _ in found.attributes)


def test_what_is_left_out_is_only_told_when_something_is() -> None:
    assert "Left out" in page(report(), PICTURES)
    assert "Left out" not in page(report(skipped=[]), PICTURES)


def test_no_pictures_and_nothing_moved() -> None:
    alone = {"detected": True, "p_value": 0.003, "accounted_for": False}
    assert "too few clean images of these classes" in page(report(images=[], moved=[], label_shift=alone), [])
    found = read(page(report(images=[], moved=[], label_shift={"detected": False, "p_value": 0.5}), []))
    assert "img" not in found.tags
    assert "the mix of clean images, p = 0.5000" in found.text


@pytest.mark.parametrize(("low", "high", "estimate"), [(0.0, 0.1, 0.0), (0.9, 1.0, 1.0), (0.0, 1.0, 0.5)])
def test_the_scale_stays_on_the_page(low: float, high: float, estimate: float) -> None:
    text = page(report(interval=[low, high], estimated_accuracy=estimate, clean_accuracy=0.02), PICTURES)
    styles = [value for name, value in read(text).attributes if name == "style"]
    assert any(f"left:{low:.2%};width:{high - low:.2%}" in style for style in styles)
    places = [part for style in styles for part in style.split(";") if part.endswith("%")]
    assert places
    for place in places:
        assert 0 <= float(place.split(":")[1].removesuffix("%")) <= 100


def test_a_picture_too_many_or_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        page(report(), PICTURES[:1])
