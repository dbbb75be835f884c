from __future__ import annotations

import timm

from stages.core.recipe import timm_architectures


def test_the_names_read_from_timms_sources_are_timms_models() -> None:
    assert set(timm_architectures()) == set(timm.list_models())
