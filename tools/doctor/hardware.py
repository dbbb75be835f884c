"""What the machine can do against what the params ask of it: GPU and driver, bfloat16, threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from tools.doctor.finding import Finding, fail, ok, some, warn
from tools.doctor.settings import section

_REINSTALL = "python -m pip install --force-reinstall --no-deps -r requirements.txt"


def gpu() -> Finding:
    """The device of params.yaml, and NVIDIA's driver against the CUDA that PyTorch was built for."""
    import torch

    from stages.core import device

    runtime = section("runtime")
    names, driver, newest = _nvidia()
    if names and not torch.cuda.is_available() and runtime.device != "cpu":
        there = f"{some(names)} is here, driver {driver}"
        if torch.version.cuda is None:
            return fail(f"{there}, but this PyTorch ({torch.__version__}) is built without CUDA", _REINSTALL)
        if newest and _numbers(newest) < _numbers(torch.version.cuda):
            return fail(
                f"{there}, which knows CUDA up to {newest}, but this PyTorch is built for {torch.version.cuda}",
                "install a newer NVIDIA driver (or: dvc exp run -S runtime.device=cpu)",
            )
        if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            return fail(f"{there}, but CUDA_VISIBLE_DEVICES={visible!r} hides it", "unset CUDA_VISIBLE_DEVICES")
        return fail(f"{there}, but PyTorch does not see it", "python -c 'import torch; torch.cuda.init()' (says why)")
    chosen = device.resolve(runtime.device)
    processes = device.num_processes(runtime)
    if chosen.type != "cuda" and runtime.device == "auto" and torch.cuda.is_available():
        return warn(f"{device.without_code(0)}: the {chosen.type} computes", "install a PyTorch that is built for it")
    if chosen.type != "cuda":
        unused = f"; {some(names)} is not used (runtime.device)" if names else ""
        return ok(f"{chosen.type} by runtime.device: {runtime.device}, PyTorch {torch.__version__}{unused}")
    together = f", {processes} processes" if processes > 1 else ""
    return ok(
        f"{torch.cuda.get_device_name(chosen)}, driver {driver or 'unknown'}, CUDA {torch.version.cuda}{together}"
    )


def bf16() -> Finding:
    """Whether the chosen device multiplies in bfloat16, which training is twice as fast with."""
    from stages.core import device
    from stages.core.precision import has_bf16

    chosen = device.resolve(section("runtime").device)
    return precision(section("train").precision, chosen.type, has_bf16(chosen))


def precision(wanted: str, kind: str, has_bf16: bool) -> Finding:
    """train.precision on a device (cpu, cuda, mps) that has bfloat16 or has not."""
    if has_bf16 and wanted == "fp32":
        return warn(
            f"the {kind} multiplies in bfloat16, but train.precision is fp32, about half as fast",
            "dvc exp run -S train.precision=auto",
        )
    if not has_bf16 and wanted == "bf16":
        return warn(
            f"the {kind} is not known to multiply in bfloat16: where it is emulated, it is slower than fp32",
            "dvc exp run -S train.precision=auto",
        )
    return ok(f"the {kind} has {'' if has_bf16 else 'no '}bfloat16, train.precision: {wanted}")


def threads() -> Finding:
    """runtime.threads against the CPUs that this process may use."""
    from stages.core import device
    from stages.core.runtime import cpu_quota, num_cpus, num_threads

    runtime = section("runtime")
    wanted, limit, quota = num_threads(runtime), num_cpus(), cpu_quota()
    if quota and max(1, int(quota)) == limit:
        why = f"the container's limit is {quota:g} CPUs"
    else:
        why = f"this process may use {limit} CPUs"
    if wanted > limit:
        return warn(
            f"runtime.threads is {runtime.threads}, and {why}: threads that wait for each other",
            f"dvc exp run -S runtime.threads={limit} (results differ in the last bits)",
        )
    if wanted < limit and runtime.device in ("auto", "cpu") and device.resolve(runtime.device).type == "cpu":
        return warn(
            f"runtime.threads is {wanted} of {limit} CPUs",
            f"dvc exp run -S runtime.threads={limit} (results differ in the last bits)",
        )
    return ok(f"{wanted} of {limit} CPUs")


def _nvidia() -> tuple[list[str], str, str]:
    """(names of the GPUs, driver version, the newest CUDA that it knows), as the driver's own tool says."""
    if not (tool := shutil.which("nvidia-smi")):
        return [], "", ""
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20)  # noqa: S603
        page = subprocess.run([tool], capture_output=True, text=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return [], "", ""
    rows = [line.split(", ") for line in listed.stdout.splitlines() if line.count(", ") == 1]
    if listed.returncode or not rows:
        return [], "", ""
    newest = re.search(r"CUDA (?:UMD )?Version: *(\d+\.\d+)", page.stdout)
    return [row[0] for row in rows], rows[0][1], newest[1] if newest else ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
