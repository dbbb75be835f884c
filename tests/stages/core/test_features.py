"""Features: the outputs and the embedding are the model's own, and adaptation leaves no trace."""

from __future__ import annotations

import tracemalloc
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.core import features as module
from stages.core import model
from stages.core.errors import InputError
from stages.core.features import Extractor
from stages.core.image_statistics import image_statistics
from stages.core.model import ModelSpec
from stages.core.precision import Policy
from stages.core.recipe import ModelParams
from tests.synthetic import clouds

CPU = torch.device("cpu")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def extractor(name: str = "test_resnet", batch_size: int = 64, image_size: int = 32) -> Extractor:
    """A model with random weights everywhere, and batch norms that are used to other images."""
    network = model.create(ModelParams.model_validate({"name": name, "pretrained": False, "weights": None}), 5, 0)
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(network.get_classifier().weight, generator=generator)  # type: ignore[operator]
    for norm in norms_of(network):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.3, generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
    names = [str(label) for label in range(5)]
    spec = ModelSpec(architecture=name, classes=names, class_ids=names, image_size=image_size, mean=MEAN, std=STD)
    return Extractor(network.eval(), spec, Policy(torch.float32, False), CPU, batch_size)


def norms_of(network: nn.Module) -> list[_BatchNorm]:
    return [norm for norm in network.modules() if isinstance(norm, _BatchNorm)]


def network_input(images: NDArray[np.uint8]) -> Tensor:
    scaled = (images.astype(np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).float()


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_untouched(network: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in network.modules())
    assert not any(part.training for part in network.modules())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("batch_size", [64, 3])
def test_outputs_and_embedding_are_the_models(name: str, batch_size: int) -> None:
    size = 160 if name == "test_vit" else 32
    images, looking = clouds(7, size, size), extractor(name, batch_size, size)
    before = state(looking.network)
    found = looking.features(images)
    assert_untouched(looking.network, before)
    network: Any = looking.network
    with torch.inference_mode():
        maps = network.forward_features(network_input(images))
        embedding, logits = network.forward_head(maps, pre_logits=True), network.forward_head(maps)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.embedding, embedding, rtol=1e-4, atol=1e-4)
    assert np.array_equal(found.statistics, image_statistics(images))
    assert len(found) == 7
    assert all(values.dtype == np.float32 for values in astuple(found))


def test_images_of_another_size_are_resized_whole() -> None:
    looking = extractor()
    small = clouds(2, 16, 16)
    doubled = torch.nn.functional.interpolate(network_input(small), size=32, mode="bilinear", align_corners=False)
    with torch.inference_mode():
        expected = looking.network(doubled)
    np.testing.assert_allclose(looking.features(small).logits, expected, rtol=1e-3, atol=1e-3)


def test_the_embedding_of_a_model_with_two_heads_is_what_the_first_sees() -> None:
    network = timm.create_model("levit_128s", num_classes=5).eval()
    names = [str(label) for label in range(5)]
    spec = ModelSpec(architecture="levit_128s", classes=names, class_ids=names, image_size=224, mean=MEAN, std=STD)
    images = clouds(2, 32, 32)
    seen = Extractor(network, spec, Policy(torch.float32, False), CPU).features(images)
    assert seen.embedding.shape == (2, network.num_features)
    assert seen.logits.shape == (2, 5)
    assert not any(part._forward_pre_hooks for part in network.modules())


def test_the_embedding_of_a_model_with_branches_is_what_all_their_heads_see() -> None:
    network: Any = timm.create_model("crossvit_tiny_240", num_classes=5).eval()
    names = [str(label) for label in range(5)]
    spec = ModelSpec(
        architecture="crossvit_tiny_240", classes=names, class_ids=names, image_size=240, mean=MEAN, std=STD
    )
    seen = Extractor(network, spec, Policy(torch.float32, False), CPU).features(clouds(2, 32, 32))
    assert seen.embedding.shape == (2, sum(head.in_features for head in network.get_classifier()))
    assert not any(part._forward_pre_hooks for part in network.modules())


def test_rows_keep_together() -> None:
    found = extractor().features(clouds(6, 32, 32))
    some = found.rows(np.array([4, 1]))
    for part, whole in zip(astuple(some), astuple(found), strict=True):
        assert np.array_equal(part, whole[[4, 1]])


def test_the_hook_is_removed_when_the_forward_raises() -> None:
    looking = extractor()
    before = state(looking.network)
    looking.network.get_classifier().weight = nn.Parameter(torch.zeros(5, 1))  # type: ignore[operator]
    with pytest.raises(RuntimeError):
        looking.features(clouds(2, 32, 32))
    with pytest.raises(RuntimeError):
        looking.adapted_logits(clouds(2, 32, 32), 2)
    before |= {name: value for name, value in looking.network.state_dict().items() if value.shape == (5, 1)}
    assert_untouched(looking.network, before)


@pytest.mark.parametrize("where", ["network", "images"])
def test_memory_that_is_exhausted_is_told_in_words(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = extractor()

    def fail(*arguments: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    if where == "network":
        monkeypatch.setattr(looking.network, "forward", fail)
    else:
        monkeypatch.setattr(module, "crop_and_resize", fail)
    with pytest.raises(InputError, match="^out of memory on cpu with 2 images of 32 px at once; free some of it$"):
        looking.features(clouds(2, 32, 32))


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("count", [3, 16])
def test_the_first_norm_mixes_the_groups_statistics_into_its_own(count: int, side: int) -> None:
    looking = extractor(image_size=side)
    images = clouds(count, side, side)
    first = norms_of(looking.network)[0]
    assert first.running_mean is not None
    assert first.running_var is not None
    seen: list[Tensor] = []

    def keep(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.extend((inputs[0].double(), output.double()))

    hook = first.register_forward_hook(keep)
    looking.adapted_logits(images, count)
    hook.remove()
    values, output = seen
    thin = values[:, :, ::2, ::2] if values.shape[2] >= 16 else values
    share = count / (count + 16)
    mean = (1 - share) * first.running_mean + share * thin.mean((0, 2, 3))
    variance = (1 - share) * first.running_var + share * thin.var((0, 2, 3), unbiased=False)
    expected = (values - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + first.eps).sqrt()
    expected = expected * first.weight.view(1, -1, 1, 1) + first.bias.view(1, -1, 1, 1)
    activation: Any = getattr(first, "act", nn.Identity())
    torch.testing.assert_close(output, activation(expected.detach()), rtol=1e-4, atol=1e-4)


def test_adapting_leaves_the_model_as_it_was() -> None:
    looking, images = extractor(), clouds(6, 32, 32)
    before = state(looking.network)
    plain = looking.features(images).logits
    adapted = looking.adapted_logits(images, 3)
    assert_untouched(looking.network, before)
    assert adapted is not None
    assert np.abs(adapted - plain).max() > 0.01
    assert np.array_equal(looking.features(images).logits, plain)


def test_groups_do_not_depend_on_each_other() -> None:
    looking, images = extractor(), clouds(10, 32, 32)
    whole = looking.adapted_logits(images, 4)
    assert whole is not None
    assert whole.shape == (10, 5)
    for start in (0, 4, 8):
        alone = looking.adapted_logits(images[start : start + 4], 4)
        assert alone is not None
        np.testing.assert_allclose(whole[start : start + 4], alone, rtol=1e-5, atol=1e-5)
    other = looking.adapted_logits(images, 10)
    assert other is not None
    assert np.abs(other - whole).max() > 1e-3, "a group's images are adapted to together"


def test_groups_have_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_GROUP", 4)
    looking, images = extractor(), clouds(6, 32, 32)
    assert np.array_equal(looking.adapted_logits(images, 100), looking.adapted_logits(images, 4))  # type: ignore[arg-type]


def test_a_model_without_batch_norms_is_not_adapted() -> None:
    assert extractor("test_vit", image_size=160).adapted_logits(clouds(2, 160, 160), 2) is None


def test_the_order_of_images_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several groups, one of a single class would otherwise be adapted to that class."""
    monkeypatch.setattr(module, "LARGEST_GROUP", 4)
    images = clouds(12, 32, 32)
    looking = extractor()
    first, order = looking.adapted_to_all(images, 256), np.random.default_rng(0).permutation(12)
    again = looking.adapted_to_all(images[order], 256)
    assert first is not None
    assert again is not None
    assert np.array_equal(again, first[order])
    assert not np.allclose(looking.adapted_logits(images[order], 4), again, atol=1e-3)  # type: ignore[arg-type]


def test_one_image_more_than_a_group_is_not_adapted_to_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    logits = Extractor._logits

    def noted(self: Extractor, images: NDArray[np.uint8]) -> Tensor:
        sizes.append(len(images))
        return logits(self, images)

    monkeypatch.setattr(Extractor, "_logits", noted)
    for count, size in ((8, 8), (9, 8), (16, 8), (25, 8), (13, 2), (111, 10)):
        assert extractor().adapted_to_all(clouds(count, 32, 32), size) is not None
    assert sizes == [8, 9, 8, 8, 9, 8, 8, 3, *[2] * 5, *[11] * 1, *[10] * 10]
    monkeypatch.setattr(module, "LARGEST_GROUP", 4)
    extractor().adapted_to_all(clouds(8, 32, 32), 8)
    assert sizes[-2:] == [4, 4]


def test_images_are_not_copied_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_GROUP", 16)
    images = clouds(256, 32, 32)
    looking = extractor()
    looking.adapted_to_all(images[:16], 256)
    tracemalloc.start()
    looking.features(images)
    looking.adapted_to_all(images, 256)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5 * images.nbytes
