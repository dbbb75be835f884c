from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from stages.core import device, precision
from stages.core.errors import InputError
from stages.core.runtime import RuntimeParams


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


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let PyTorch report GPUs of these kinds, and code for these: old cards are in no machine that runs the tests."""

    def report(*capabilities: tuple[int, int], built_for: Sequence[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA number {index}")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built_for))
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    return report


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", (8, 6), True),
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_80", (9, 0), False),
        ("compute_90", (12, 0), True),
        ("sm_120", (9, 0), False),
        ("sm_75", (7, 0), False),
    ],
)
def test_which_gpus_a_pytorch_has_code_for(
    architecture: str, capability: tuple[int, int], runs: bool, gpus: Callable[..., None]
) -> None:
    gpus(capability, built_for=[architecture])
    assert (device.without_code(0) is None) is runs
    assert (device.resolve("auto").type == "cuda") is runs


def test_auto_passes_over_a_gpu_without_code_and_says_so(
    gpus: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    runtime = RuntimeParams(
        device="auto",
        threads=torch.get_num_threads(),
        workers=0,
        processes=1,
        resident=False,
        checkpoint_seconds=None,
        checkpoint_steps=None,
        cache_dir="cache",
    )
    gpus((6, 1), built_for=["sm_75", "sm_120"])
    assert device.set_up(runtime).type in ("cpu", "mps")
    reason = "NVIDIA number 0 is sm_61, and this PyTorch is built for sm_75, sm_120"
    assert capfd.readouterr().err == f"runtime.device: auto: {reason}; it is not used\n"
    with pytest.raises(InputError, match=f"runtime.device: 'cuda': {reason}; use auto or cpu"):
        device.resolve("cuda")
    gpus((6, 1), (8, 6), built_for=["sm_75", "sm_80"])  # a newer one beside it
    assert device.resolve("auto") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="NVIDIA number 0 is sm_61"):
        device.resolve("cuda:0")


def test_gpus_of_amd_are_not_judged_by_nvidias_names(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus((9, 0), built_for=["gfx90a", "gfx1100"])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.resolve("cuda") == torch.device("cuda", 0)


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
