from __future__ import annotations

import pytest
import torch

from stages.core import device, precision
from stages.core.errors import InputError


def test_auto_takes_the_best_that_is_there() -> None:
    found = device.resolve("auto").type
    assert found == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert device.resolve("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda:99", "mps", "cuda"])
def test_a_missing_device_is_an_error(name: str) -> None:
    if (name == "cuda" and torch.cuda.is_available()) or (name == "mps" and torch.backends.mps.is_available()):
        pytest.skip(f"this machine has {name}")
    with pytest.raises(InputError, match=rf"runtime\.device: '{name}' is not there \(this machine has: cpu"):
        device.resolve(name)


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert precision.resolve("fp32", cpu) == precision.Policy(torch.float32, False)
    assert precision.resolve("bf16", cpu).dtype == torch.bfloat16
    assert precision.resolve("auto", cpu).dtype == (torch.bfloat16 if precision.has_bf16(cpu) else torch.float32)
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        precision.resolve("fp16", cpu)
    assert precision.resolve("fp16", torch.device("cuda")).scale_gradients


def test_bf16_of_tiny_images_on_a_cpu_is_refused_and_not_chosen() -> None:
    cpu = torch.device("cpu")
    assert precision.resolve("auto", cpu, smallest_side=31).dtype == torch.float32
    assert precision.resolve("auto", cpu, smallest_side=32) == precision.resolve("auto", cpu)
    with pytest.raises(InputError, match=r"train\.precision: bf16 gives wrong gradients for images of 16 px on a CPU"):
        precision.resolve("bf16", cpu, smallest_side=16)
    assert precision.resolve("bf16", torch.device("cuda"), smallest_side=16).dtype == torch.bfloat16
