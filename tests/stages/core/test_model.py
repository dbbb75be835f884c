from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.core import model
from stages.core.errors import InputError
from stages.core.recipe import ModelParams

CPU = torch.device("cpu")
NAME = "test_resnet"


def params(**changes: object) -> ModelParams:
    return ModelParams.model_validate({"name": NAME, "pretrained": False, "weights": None} | changes)


def spec(num_classes: int = 3) -> model.ModelSpec:
    names = [str(i) for i in range(num_classes)]
    return model.ModelSpec(
        architecture=NAME, classes=names, class_ids=names, image_size=32, mean=[0.5] * 3, std=[0.25] * 3
    )


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_seed_gives_the_same_model() -> None:
    assert same(model.create(params(), 3, 1), model.create(params(), 3, 1))
    assert not same(model.create(params(), 3, 1), model.create(params(), 3, 2))


def test_a_saved_model_comes_back_with_its_spec(tmp_path: Path) -> None:
    network = model.create(params(), 3, 0)
    model.save(tmp_path / "classifier", network, spec())
    loaded, found = model.load(tmp_path / "classifier", CPU)
    assert same(network, loaded)
    digest = hashlib.sha256((tmp_path / "classifier/model.safetensors").read_bytes()).hexdigest()
    assert found == spec().model_copy(update={"sha256": digest})
    assert not loaded.training
    assert sorted(path.name for path in (tmp_path / "classifier").iterdir()) == ["model.json", "model.safetensors"]


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    network = model.create(params(), 3, 0).to(memory_format=torch.channels_last)
    for name in "ab":
        model.save(tmp_path / name, network, spec())
    for file in ("model.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_weights_come_from_a_file(suffix: str, wrapper: str | None, tmp_path: Path) -> None:
    source = model.create(params(), 3, 7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({wrapper: source.state_dict()} if wrapper else source.state_dict(), path)
    assert same(model.create(params(weights=str(path)), 3, 0), source)


def test_a_head_for_other_classes_stays_fresh(tmp_path: Path) -> None:
    source = model.create(params(), 5, 7)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    network = model.create(params(weights=str(tmp_path / "w.safetensors")), 3, 0)
    fresh = model.create(params(), 3, 0)
    for name, value in network.state_dict().items():
        reference = fresh if name.startswith("fc.") else source
        assert torch.equal(value, reference.state_dict()[name]), name


def test_wrong_weights_are_refused_by_name(tmp_path: Path) -> None:
    good = model.create(params(), 3, 0).state_dict()
    first = next(iter(good))
    cases = {
        "lacks": {name: value for name, value in good.items() if name != first},
        "has unknown extra": good | {"extra": torch.zeros(1)},
        f"has another shape of {first}": good | {first: torch.zeros(1)},
    }
    path = tmp_path / "w.safetensors"
    for message, state in cases.items():
        save_file(state, path)
        with pytest.raises(InputError, match=rf"model\.weights: .*w\.safetensors: does not fit model\.name: {message}"):
            model.create(params(weights=str(path)), 3, 0)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_files_that_are_no_state_dict_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match="no such file"):
        model.create(params(weights=str(path)), 3, 0)
    for content in (b"", b"hello", b"<html>" * 100):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.weights: .*(not a readable state dict|refused)"):
            model.create(params(weights=str(path)), 3, 0)


def test_weights_that_are_missing_are_named_and_dvc_may_have_them(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match=r"model\.weights: .*w\.safetensors: no such file$"):
        model.create(params(weights=str(path)), 3, 0)
    (tmp_path / "w.safetensors.dvc").touch()
    with pytest.raises(InputError, match=r"no such file; DVC keeps it: .*`dvc checkout .*/w\.safetensors\.dvc`"):
        model.create(params(weights=str(path)), 3, 0)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, ("/tmp/evil",))


def test_code_in_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": Evil()}, path)
    with pytest.raises(InputError, match="refused: it holds more than tensors"):
        model.create(params(weights=str(path)), 3, 0)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(InputError, match="refused|not a readable"):
        model.create(params(weights=str(path)), 3, 0)


def test_pretrained_without_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"no weights of 'resnet18' came from the hub.*model\.weights to a local file"):
        model.create(params(name="resnet18", pretrained=True), 3, 0)


def test_pretrained_and_weights_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        params(pretrained=True, weights="x")


def test_broken_model_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.json: not found; run `dvc repro train`"):
        model.load(tmp_path, CPU)
    model.save(tmp_path / "m", model.create(params(), 3, 0), spec(4))
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be loaded"):
        model.load(tmp_path / "m", CPU)
    content = json.loads((tmp_path / "m" / "model.json").read_text())
    del content["classes"]
    (tmp_path / "m" / "model.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a model description"):
        model.load(tmp_path / "m", CPU)


def test_altered_weights_are_refused_and_those_without_a_checksum_are_not(tmp_path: Path) -> None:
    network = model.create(params(), 3, 0)
    model.save(tmp_path / "m", network, spec())
    weights, description = tmp_path / "m/model.safetensors", tmp_path / "m/model.json"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: altered since train wrote it .*tools\.verify --repair"):
        model.load(tmp_path / "m", CPU)
    old = json.loads(description.read_text())
    del old["sha256"]
    description.write_text(json.dumps(old))
    assert not same(model.load(tmp_path / "m", CPU)[0], network)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("vit_tiny_patch16_224", [48], "train.image_size: vit.* 48 x 48 pixels: Input height"),
        (
            "vit_tiny_patch16_224",
            [128, 224],
            "train.progressive: vit.* of 128 x 128 pixels: Input height",
        ),
        ("inception_v3", [48], "train.image_size: inception_v3 .* Kernel size can't be greater"),
    ],
)
def test_a_size_that_a_network_does_not_take_is_refused_by_key(name: str, sizes: list[int], message: str) -> None:
    with pytest.raises(InputError, match=rf"params\.yaml: {message}.*; choose another size.*, or another model\.name"):
        model.check_takes(model.create(params(name=name), 3, 0), name, sizes)


def test_a_size_that_a_network_takes_changes_nothing() -> None:
    network = model.create(params(), 3, 0)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model.check_takes(network, NAME, [16, 24])
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_a_tag_that_timm_does_not_have_is_refused() -> None:
    with pytest.raises(InputError, match=r"params\.yaml: model\.name: 'resnet18\.a0': Invalid pretrained tag"):
        model.create(params(name="resnet18.a0"), 3, 0)


def test_weights_that_two_names_share_are_saved(tmp_path: Path) -> None:
    """As CoaT's convolutions are."""
    network = model.create(params(), 3, 0)
    network.add_module("again", network.get_submodule(next(n for n, m in network.named_modules() if "conv" in n)))
    state = network.state_dict()
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) < len(pointers)
    model.save(tmp_path / "m", network, spec())
    saved = load_file(tmp_path / "m/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in state.items())
