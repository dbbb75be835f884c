"""What the benchmark measures: each part yields contenders that are timed in turn, round after round."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from stages import extract, preprocess
from stages.core import device, engine, loader, model, precision
from stages.core.dataset import PackMeta, load_meta, load_split
from stages.core.errors import InputError
from stages.core.packing import Geometry, pack
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams, num_readers, num_workers
from stages.core.source import RAW, SPLITS, load_source_info
from tools.benchmark.baseline import PlainLoop, pack_with_pillow

FILES = Path("files")  # the images as ImageFolder wants them
_GPU_WORKERS = 16  # processes of the plain loop's loader beside a GPU
_MATRIX_SIDES = (1024, 2048, 4096, 8192)

# Numbers of one round, by contender.
Measure = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Setup:
    """What is measured; the working directory holds the images."""

    data: extract.Params
    pack: preprocess.Params
    model: ModelParams
    train: TrainParams
    runtime: RuntimeParams
    num_steps: int  # in a round
    root: Path  # of the repository
    quick: bool

    def prepare(self) -> None:
        """Extract the images to tars and files, and pack them."""
        extract.main(self.data)
        num_images = load_source_info().num_images["train"]
        if num_images < self.train.batch_size:
            raise InputError(f"--batch-size: {self.train.batch_size} is more than the {num_images} training images")
        preprocess.main(self.pack)
        write_files()

    @cached_property
    def device(self) -> torch.device:
        """Where both train."""
        return device.set_up(self.runtime)

    @cached_property
    def ours(self) -> OurLoop:
        """Our training loop."""
        return OurLoop(self)

    @cached_property
    def plain(self) -> PlainLoop:
        """The loop to compare with."""
        workers = _GPU_WORKERS if self.device.type == "cuda" else num_workers(self.runtime)
        return PlainLoop(FILES / "train", self.model.name, self.train, self.device, workers)


def write_files() -> None:
    """Write the extracted images to FILES, one file each."""
    for split in SPLITS:
        with tarfile.open(RAW / f"{split}.tar", "r:") as tar:
            for info in tar:
                content = tar.extractfile(info)
                assert content is not None
                path = FILES / split / info.name  # extract has checked the names
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


class OurLoop:
    """The train step and the loader that the stages train and profile run."""

    def __init__(self, setup: Setup) -> None:
        self._meta: PackMeta = load_meta()
        self._params, self._device = setup.train, setup.device
        self.policy = precision.resolve(setup.train.precision, self._device)
        network = model.create(setup.model, len(self._meta.classes), setup.train.seed)
        self.trainer = engine.create_trainer(network, setup.train, self.policy, self._device)
        split = load_split("train", self._meta)
        self._source = loader.open_source(split, self._device, setup.runtime.resident, num_readers(setup.runtime))
        self.batches = self._endless()
        self._step = 0

    def train(self, num_steps: int) -> tuple[float, float]:
        """Images per second of training steps, loading included, and the share of the time that loading takes."""
        loading = 0.0
        self._train_step()
        device.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(num_steps):
            loading += self._train_step()
        device.synchronize(self._device)
        seconds = time.perf_counter() - start
        return num_steps * self._params.batch_size / seconds, loading / seconds

    def load(self, num_steps: int) -> float:
        """Images per second of the loader alone."""
        for _ in range(3):
            next(self.batches)
        device.synchronize(self._device)
        start = time.perf_counter()
        for _ in range(num_steps):
            next(self.batches)
        device.synchronize(self._device)
        return num_steps * self._params.batch_size / (time.perf_counter() - start)

    def _train_step(self) -> float:
        start = time.perf_counter()
        images, labels = next(self.batches)
        loading = time.perf_counter() - start
        engine.train_step(self.trainer, images, labels, self._params.lr, self._step)
        self._step += 1
        return loading

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            yield from loader.training_batches(self._source, self._meta, self._params, self.policy.dtype, epoch)
            epoch += 1


def train_step(setup: Setup) -> Measure:
    """Training steps, ours and the plain loop's."""

    def measure() -> dict[str, float]:
        ours, share = setup.ours.train(setup.num_steps)
        whole_ms = 1e3 * setup.train.batch_size / ours
        plain = setup.plain.train(setup.num_steps)
        return {"ours": ours, "plain": plain, "loading_ms": share * whole_ms, "whole_ms": whole_ms}

    return measure


def loaders(setup: Setup) -> Measure:
    """The loaders alone."""

    def measure() -> dict[str, float]:
        steps = 3 * setup.num_steps
        return {"ours": setup.ours.load(steps), "plain": setup.plain.load(steps)}

    return measure


def packing(setup: Setup) -> Measure:
    """The stage preprocess (its worker processes, checks and hashes included) and a plain loop to the same arrays."""
    paths = {split: sorted((FILES / split).glob("*/*")) for split in SPLITS}
    size, count = setup.pack.preprocess.image_size, sum(len(some) for some in paths.values())

    def timed(work: Callable[[Path], object]) -> float:
        scratch = Path("scratch")
        scratch.mkdir()
        start = time.perf_counter()
        work(scratch)
        seconds = time.perf_counter() - start
        shutil.rmtree(scratch)
        return count / seconds

    def ours(out: Path) -> None:
        knobs = setup.pack.preprocess
        geometry = Geometry(knobs.image_size, knobs.crop_mode, knobs.interpolation)
        tars = {split: RAW / f"{split}.tar" for split in SPLITS}
        counts = {split: len(paths[split]) for split in SPLITS}
        pack(tars, counts, out, geometry, skip_bad=False, workers=num_workers(setup.runtime))

    def plain(out: Path) -> None:
        for split in SPLITS:
            pack_with_pillow(paths[split], size, out / f"{split}.npy")

    def measure() -> dict[str, float]:
        return {"ours": timed(ours), "plain": timed(plain)}

    return measure


def compute_share(setup: Setup) -> Measure:
    """FLOP/s of our train step, of a large matrix product, and of the network's convolutions alone; in 10^9."""
    from torch.utils.flop_counter import FlopCounterMode

    trainer, where = setup.ours.trainer, setup.device
    images, labels = next(setup.ours.batches)
    convolutions = Convolutions(trainer.model, images, setup.ours.policy.dtype)
    with FlopCounterMode(display=False) as counter, trainer.policy.autocast(where):
        trainer.loss(trainer.model(images), labels).backward()
    per_image = counter.get_total_flops() / len(images)
    sides = _MATRIX_SIDES[:1] if setup.quick else _MATRIX_SIDES[:3] if where.type == "cpu" else _MATRIX_SIDES

    def measure() -> dict[str, float]:
        speed, _ = setup.ours.train(setup.num_steps)
        products = max(_matrix_product(side, setup.ours.policy.dtype, where) for side in sides)
        alone = convolutions.flops / convolutions.seconds(1 if setup.quick else 3)
        return {"ours": speed * per_image / 1e9, "matmul": products / 1e9, "convolutions": alone / 1e9}

    return measure


def _matrix_product(side: int, dtype: torch.dtype, where: torch.device) -> float:
    """FLOP/s of a square matrix product, the best of three."""
    a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
    return 2 * side**3 / min(_seconds(lambda: a @ b, where) for _ in range(3))


def _seconds(work: Callable[[], object], where: torch.device) -> float:
    device.synchronize(where)
    start = time.perf_counter()
    work()
    device.synchronize(where)
    return time.perf_counter() - start


class Convolutions:
    """The convolutions of a network, each with its real shapes, in the dtype that the network computes them in.

    What is left of a train step when everything else costs nothing. InputError for a network without any.
    """

    def __init__(self, network: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        self._cases: dict[tuple[Any, ...], tuple[nn.Conv2d, torch.Size, bool, int]] = {}
        self._dtype, self._device = dtype, images.device
        self.flops = 0.0  # forward and backward of the batch

        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(module, nn.Conv2d)
            shape, first = inputs[0].shape, not inputs[0].requires_grad
            key = (shape, module.weight.shape, module.stride, module.padding, module.dilation, module.groups, first)
            _, _, _, calls = self._cases.get(key, (module, shape, first, 0))
            self._cases[key] = (module, shape, first, calls + 1)
            # The gradients of the weights and of the input cost as much as the product itself.
            self.flops += 2.0 * output.numel() * module.weight[0].numel() * (2 if first else 3)

        hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Conv2d)]
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            network(images)
        for hook in hooks:
            hook.remove()
        if not self._cases:
            raise InputError(f"model.name: {type(network).__name__} has no convolutions to compare with")

    def seconds(self, repeats: int) -> float:
        """Time of all forward and backward passes of a batch, one by one; the median of `repeats` each."""
        cases = self._cases.values()
        return sum(calls * self._one(module, shape, first, repeats) for module, shape, first, calls in cases)

    def _one(self, module: nn.Conv2d, shape: torch.Size, first: bool, repeats: int) -> float:
        x = self._prepared(torch.randn(shape)).requires_grad_(not first)
        weight = self._prepared(module.weight.detach()).requires_grad_()
        stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
        assert not isinstance(padding, str)

        def forward() -> Tensor:
            return torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)

        gradient = torch.randn_like(forward(), memory_format=torch.channels_last)

        def work() -> None:
            torch.autograd.grad(forward(), [weight] if first else [weight, x], gradient)

        work()
        return float(np.median([_seconds(work, self._device) for _ in range(repeats)]))

    def _prepared(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype, memory_format=torch.channels_last)


def dvc_overhead(setup: Setup) -> Measure:
    """`dvc repro` with nothing to do and `dvc status`, in seconds.

    In this repository where it is up to date, else in a copy with a tiny sample.
    """
    folder = setup.root
    if _dvc(folder, "status", "--quiet").returncode:
        folder = _tiny_repository(setup.root, Path("repository"))

    def seconds(command: str) -> float:
        start = time.perf_counter()
        result = _dvc(folder, command)
        if result.returncode:
            raise InputError(f"{folder}: dvc {command}: {result.stderr.strip()}")
        return time.perf_counter() - start

    return lambda: {"ours": seconds("repro"), "plain": seconds("status")}


def _dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's dvc; the stages that it starts find this environment's python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(  # noqa: S603
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )


def _tiny_repository(root: Path, folder: Path) -> Path:
    """A copy of the repository's files with a tiny sample, whose pipeline has run."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file() and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    yaml = YAML()
    document = yaml.load(folder / "params.yaml")
    document["sample"] |= {"train_images": 60, "val_images": 20, "image_size": 32}
    document["preprocess"]["image_size"] = 32
    document["model"]["name"] = "test_resnet"
    document["train"] |= {"image_size": 32, "epochs": 2, "batch_size": 20}
    document["profile"] |= {"timed_steps": 2, "active": 1}
    yaml.dump(document, folder / "params.yaml")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)  # noqa: S603, S607
    print("benchmark: running the pipeline on a tiny sample", flush=True)
    result = _dvc(folder, "repro")
    if result.returncode:
        raise InputError(f"the pipeline fails in a copy of {root}: {result.stderr.strip()}")
    return folder.absolute()


PARTS: dict[str, Callable[[Setup], Measure]] = {
    "train": train_step,
    "preprocess": packing,
    "loader": loaders,
    "compute": compute_share,
    "dvc": dvc_overhead,
}
