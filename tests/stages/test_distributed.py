"""Several processes train the same model as one: under runtime.processes, and on two machines of their own."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import PATIENCE, ROOT, files, run, set_params, start, step_reached, wait_until

# Without momentum's and Adam's amplification of rounding: what is compared is the mathematics.
RECIPE = {
    "train.precision": "fp32",
    "train.optimizer": "sgd",
    "train.lr": 0.05,
    "train.epochs": 4,
    "train.log_every": 1,
    "train.crop_scale": [0.5, 1.0],
}
TOLERANCE = 2e-3  # of the distance between two sets of weights, relative to how far training moved them


@pytest.fixture
def prepared(packed: Path) -> Path:
    set_params(packed / "params.yaml", RECIPE)
    return packed


def train(folder: Path, **overrides: object) -> subprocess.Popen[str]:
    set_params(folder / "params.yaml", {key.replace("__", "."): value for key, value in overrides.items()})
    return start(folder, sys.executable, "-m", "stages.train", environment={"PYTHONPATH": str(ROOT)})


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def weights(folder: Path) -> torch.Tensor:
    state = load_file(folder / "models/classifier/model.safetensors")
    return torch.cat([value.double().flatten() for name, value in sorted(state.items()) if "num_batches" not in name])


def losses(folder: Path) -> list[float]:
    with (folder / "metrics/train/plots/metrics/train/loss.tsv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]


def check_equal(folder: Path, one: torch.Tensor, one_losses: list[float], start_weights: torch.Tensor) -> None:
    moved = (one - start_weights).norm()
    assert moved > 0.1
    assert (weights(folder) - one).norm() < TOLERANCE * moved
    assert losses(folder) == pytest.approx(one_losses, abs=1e-3)


def reference(folder: Path, **overrides: object) -> tuple[torch.Tensor, list[float], torch.Tensor]:
    """Weights and losses of one process, and the weights before training."""
    finish(train(folder, runtime__processes=1, train__lr=1e-12, train__weight_decay=0.0, **overrides))
    before = weights(folder)
    finish(train(folder, runtime__processes=1, train__lr=RECIPE["train.lr"], **overrides))
    return weights(folder), losses(folder), before


def test_two_processes_equal_one(prepared: Path) -> None:
    expected = reference(prepared, train__grad_clip=5.0, train__progressive=16)
    output = finish(train(prepared, runtime__processes=2))
    assert "on 2 x cpu" in output
    assert output.count("epoch 1/4") == 1, "only rank 0 speaks"
    check_equal(prepared, *expected)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_goes_on_to_the_same_bytes(prepared: Path) -> None:
    overrides = {"train__epochs": 20, "runtime__processes": 2, "runtime__checkpoint_steps": 5}
    finish(train(prepared, **overrides))
    expected = files(prepared / "models", prepared / "metrics")
    shutil.rmtree(prepared / "metrics")
    process = train(prepared)
    wait_until(lambda: step_reached(prepared) >= 12)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline()[-2:] == ["-m", "stages.train"]
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "process 1 of 2 ended with SIGKILL" in output
    assert "run the same command again, and training goes on from there" in output
    assert "Traceback" not in output
    assert not any(rank.is_running() for rank in ranks)
    shutil.rmtree(prepared / "metrics")
    assert re.search(r"goes on after step (\d+) of 60", finish(train(prepared)))
    assert files(prepared / "models", prepared / "metrics") == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_launcher_saves_and_ends_all(number: signal.Signals, prepared: Path) -> None:
    process = train(prepared, train__epochs=40, runtime__processes=2, runtime__checkpoint_seconds=None)
    wait_until(lambda: step_reached(prepared) >= 6)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    saved = re.search(r"(\d+) of 120 steps are done and saved", output)
    assert saved, output
    output = finish(train(prepared, runtime__processes=1))
    assert f"goes on after step {saved[1]} of 120" in output, "one process goes on where two stopped"


def test_a_batch_that_does_not_divide_is_refused(prepared: Path) -> None:
    output, _ = (process := train(prepared, runtime__processes=2, train__batch_size=15)).communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "params.yaml: train.batch_size: 15 does not divide into 2 processes" in output
    assert "Traceback" not in output


def test_processes_for_gpus_that_are_not_there_are_refused(prepared: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    output, _ = (process := train(prepared, runtime__processes="gpu")).communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "params.yaml: runtime.processes: 'gpu', but there is no GPU; use a number" in output


BATCH_NORM = """
import torch, torch.distributed as dist
from timm.layers import BatchNormAct2d
from stages.core.batchnorm import share_statistics
dist.init_process_group("gloo")
torch.manual_seed(0)
for make in (lambda: torch.nn.BatchNorm2d(6), lambda: BatchNormAct2d(6), lambda: torch.nn.BatchNorm1d(6)):
    shape = (8, 6) if isinstance(make(), torch.nn.BatchNorm1d) else (8, 6, 5, 7)
    whole, shared = make(), share_statistics(torch.nn.Sequential(make()), torch.device("cpu"))[0]
    with torch.no_grad():
        for module in (whole, shared):
            module.weight.copy_(torch.linspace(0.5, 2, 6)), module.bias.copy_(torch.linspace(-1, 1, 6))
    for step in range(2):
        images = (100 + 3 * torch.randn(shape)).requires_grad_()
        target = torch.randn(shape)
        part = images.detach().chunk(2)[dist.get_rank()].clone().requires_grad_()
        (whole(images) * target).mean().backward()
        output = shared(part)
        (output * target.chunk(2)[dist.get_rank()]).mean().backward()
        # DDP would take the mean of the gradients; a process's loss is the mean over its part.
        torch.testing.assert_close(part.grad / 2, images.grad.chunk(2)[dist.get_rank()], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(shared.running_mean, whole.running_mean)
    torch.testing.assert_close(shared.running_var, whole.running_var)
    assert shared.num_batches_tracked == 2
    whole.eval(), shared.eval()
    torch.testing.assert_close(shared(images), whole(images))
print("equal")
"""


MEAN = """
import torch
from stages.core.distributed import world
with world(torch.device("cpu")) as processes:
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processes.mean(losses), losses)
    ranks = processes.mean(torch.tensor([float(processes.shard.rank)]))
    assert ranks == 1 and ranks.dtype == torch.float32
    print("equal")
"""


@pytest.mark.parametrize(("script", "count"), [(BATCH_NORM, 2), (MEAN, 3)])
def test_what_processes_exchange(script: str, count: int, tmp_path: Path) -> None:
    """Shared batch norms are those of the whole batch; the mean of a value that all have is the value."""
    (tmp_path / "script.py").write_text(script)
    # Without an address it takes the host's name, which does not resolve on a machine without a network.
    local = ("--standalone", "--local-addr=localhost", f"--nproc-per-node={count}")
    launcher = [sys.executable, "-m", "torch.distributed.run", *local, "script.py"]
    output = run(tmp_path, *launcher, environment={"PYTHONPATH": str(ROOT)}).stdout
    assert output.count("equal") == count


# --- two machines: network namespaces with a wire between them


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Names of two network namespaces, 10.99.0.1 and 10.99.0.2 on one wire."""
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        pytest.skip("network namespaces need Linux and `ip` (Debian: iproute2)")
    tag = uuid.uuid4().hex[:6]
    names = [f"a{tag}", f"b{tag}"]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to make network namespaces: {made.stderr.strip()}")
    try:
        commands = [f"ip netns add {names[1]}", f"ip link add v{names[0]} type veth peer name v{names[1]}"]
        for number, name in enumerate(names, 1):
            commands += [
                f"ip link set v{name} netns {name}",
                f"ip -n {name} addr add 10.99.0.{number}/24 dev v{name}",
                f"ip -n {name} link set v{name} up",
                f"ip -n {name} link set lo up",
            ]
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_node(folder: Path, namespace: str, number: int) -> subprocess.Popen[str]:
    """torchrun as docs/TRAINING.md prints it, on one of two machines."""
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=10.99.0.1:29400", f"--rdzv-conf=is_host={number == 1}"),
        *(f"--local-addr=10.99.0.{number}", "-m", "stages.train"),
    ]
    environment = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": f"v{namespace}"}
    return start(folder, "ip", "netns", "exec", namespace, *torchrun, environment=environment)


@pytest.mark.slow
def test_two_machines_equal_one(nodes: list[str], prepared: Path, tmp_path: Path) -> None:
    expected = reference(prepared)
    other = tmp_path / "other-machine"
    other.mkdir()
    for name in ("data", "params.yaml"):
        copy = shutil.copytree if (prepared / name).is_dir() else shutil.copy2
        copy(prepared / name, other / name)
    shutil.rmtree(prepared / "models")
    processes = [start_node(prepared, nodes[0], 1), start_node(other, nodes[1], 2)]
    outputs = [finish(process) for process in processes]
    first = prepared if (prepared / "models").exists() else other  # torchrun numbers the machines as they come
    assert sum("train: resnet" in output or "train: test_resnet on 2 x cpu" in output for output in outputs) == 1
    check_equal(first, *expected)
    second = other if first is prepared else prepared
    assert not (second / "models").exists(), "only rank 0 writes"


@pytest.mark.slow
def test_machines_with_other_params_are_told_apart(nodes: list[str], prepared: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-machine"
    shutil.copytree(prepared / "data", other / "data")
    shutil.copy2(prepared / "params.yaml", other)
    set_params(other / "params.yaml", {"train.lr": 0.04})
    processes = [start_node(prepared, nodes[0], 1), start_node(other, nodes[1], 2)]
    outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert "have other params, data or code than process 0" in "".join(outputs)
