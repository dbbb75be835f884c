"""Models: any of timm's, from scratch, from the hub or from a file; saved with all that using them takes."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.core.errors import InputError, where_dvc_has_it
from stages.core.output import check_unaltered, disk_errors, replace_directory, sha256_of, write_json
from stages.core.params import Section
from stages.core.recipe import ModelParams

CLASSIFIER = Path("models/classifier")


class ModelSpec(Section):
    """model.json: what evaluate, export, predict and monitor need beside the weights."""

    architecture: str  # name in timm
    classes: list[str]  # readable names, in the order of the logits
    class_ids: list[str]  # folder names in the training data
    image_size: int  # side in pixels of the network's input
    mean: list[float]  # per RGB channel, of pixel values scaled to [0, 1]
    std: list[float]
    sha256: str | None = None  # of model.safetensors; None before it is saved


def create(params: ModelParams, num_classes: int, seed: int) -> nn.Module:
    """A float32 model of timm on the CPU, initialised from `seed`, the hub (`pretrained`) or a file (`weights`)."""
    torch.manual_seed(seed)
    if not params.pretrained:
        try:
            model = timm.create_model(params.name, pretrained=False, num_classes=num_classes)
        except RuntimeError as error:  # resnet18.a0
            raise InputError(f"params.yaml: model.name: {params.name!r}: {_first_line(error)}") from None
        head = model.get_classifier()  # type: ignore[operator]  # every model of timm has it
        if isinstance(head, nn.Linear):  # from zero: the first steps shape the features, not a random read-out of them
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        if params.weights is not None:
            _load_weights(model, Path(params.weights).expanduser())
        return model
    try:
        return timm.create_model(params.name, pretrained=True, num_classes=num_classes)
    except (OSError, RuntimeError, ValueError) as error:  # the hub's client raises all three when it is offline
        raise InputError(
            f"params.yaml: model.pretrained: no weights of {params.name!r} came from the hub: "
            f"{_first_line(error)}; go online, set model.weights to a local file, or set model.pretrained to false"
        ) from None


def check_takes(model: nn.Module, name: str, sizes: Sequence[int]) -> None:
    """InputError where a network of timm does not take images of one of the sizes (pixels), which are in rising order.

    The last is `train.image_size`; those before it are of progressive resizing.
    """
    was_training = model.training
    model.eval()
    for size in sizes[::-1]:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError) as error:
            is_last = size == sizes[-1]
            key = "train.image_size" if is_last else "train.progressive"
            advice = "" if is_last else " or null (it grows in steps of 16 pixels)"
            raise InputError(
                f"params.yaml: {key}: {name} does not take images of {size} x {size} pixels: {_first_line(error)}; "
                f"choose another size{advice}, or another model.name"
            ) from None
    model.train(was_training)


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict (.safetensors, or .pt/.pth without code in it); a head for other classes stays fresh."""
    where = f"params.yaml: model.weights: {path}"
    if not path.is_file():
        raise InputError(f"{where}: no such file{where_dvc_has_it(path)}")
    try:
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise InputError(f"{where}: not a readable state dict: {_first_line(error)}") from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{where}: refused: it holds more than tensors: {_first_line(error)}") from None
    for wrapper in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"{where}: expected a state dict (names to tensors)")
    state = {name.removeprefix("module."): value for name, value in loaded.items()}
    own = model.state_dict()
    head: Any = dict(model.default_cfg)["classifier"]  # type: ignore[arg-type]  # timm sets it on every model
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    for name in [name for name in state if name.startswith(heads)]:
        if name in own and state[name].shape != own[name].shape:
            del state[name]
    missing = [name for name in own if name not in state and not name.startswith(heads)]
    unexpected = [name for name in state if name not in own]
    misshapen = [name for name in state if name in own and state[name].shape != own[name].shape]
    for what, names in (("lacks", missing), ("has unknown", unexpected), ("has another shape of", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{where}: does not fit model.name: {what} {', '.join(names[:3])}{more}")
    model.load_state_dict(own | state)


def save(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Write a model directory (model.safetensors, and model.json with its checksum); it appears whole or not at all."""
    with replace_directory(folder) as out:
        # Copies: what a network shares between names (CoaT) does not fit into safetensors otherwise.
        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        with disk_errors(folder):
            save_file(state, out / "model.safetensors")
        spec = spec.model_copy(update={"sha256": sha256_of(out / "model.safetensors")})
        write_json(out / "model.json", spec.model_dump())


def load_spec(folder: Path = CLASSIFIER) -> ModelSpec:
    """Read model.json of a model directory."""
    path = folder / "model.json"
    try:
        return ModelSpec.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run `dvc repro train` (or `dvc checkout`)") from None
    except ValidationError as error:
        raise InputError(f"{path}: not a model description: {_first_line(error)}") from None


def load(folder: Path, device: torch.device) -> tuple[nn.Module, ModelSpec]:
    """The model of a model directory in evaluation mode on a device, and its spec."""
    spec = load_spec(folder)
    model = timm.create_model(spec.architecture, pretrained=False, num_classes=len(spec.classes))
    path = folder / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be loaded into {spec.architecture}: {_first_line(error)}") from None
    check_unaltered(path, spec.sha256, "train")
    return model.eval().to(device).to(memory_format=torch.channels_last), spec


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
