"""Stage profile: the real train step and the real loader under torch.profiler.

With `runtime.processes` it is the share of one process, without what the processes exchange. On CUDA the times are of
the step as train runs it, a CUDA graph; the operators are recorded without one, because a graph dispatches none.

Inputs   data/processed/; params `model`, `train`, `profile`, `runtime`
Outputs  data/profile/operators.csv   operators of one train step: calls, shapes, FLOPs. No times, so that it repeats
Beside   data/profile/trace-N.json.gz Chrome trace (open in https://ui.perfetto.dev), one a repeat
         data/profile/operators.txt   the most expensive operators by time
         data/profile/memory-N.png    memory timeline, with profile.profile_memory
         metrics/profile.json         throughput, step time, loader share, peak memory, FLOPs
         Times differ from run to run, so these are no DVC outs: dvc.lock stays the same when the stage runs again
Command  python -m stages.profile
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stages.core.params import Section, load_params
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams, num_readers
from stages.core.stopping import run_stage

if TYPE_CHECKING:
    import torch
    from torch.profiler import profile

    from stages.core.dataset import PackMeta
    from stages.core.engine import Trainer
    from stages.core.loader import Source

PROFILE = Path("data/profile")
METRICS = Path("metrics/profile.json")

Count = Annotated[int, Field(ge=1)]


class ProfileParams(Section):
    """The `profile` section of params.yaml; all but `timed_steps` are torch.profiler's own."""

    timed_steps: Count
    wait: Annotated[int, Field(ge=0)]
    warmup: Annotated[int, Field(ge=0)]
    active: Count
    repeat: Count
    record_shapes: bool
    profile_memory: bool
    with_stack: bool
    with_flops: bool
    with_modules: bool


class Params(Section):
    """What this stage reads."""

    model: ModelParams
    train: TrainParams
    profile: ProfileParams
    runtime: RuntimeParams


def main(params: Params) -> None:
    """Time the train step undisturbed, then record it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library reports every start and stop otherwise
    from stages.core import device, engine, model, precision
    from stages.core.dataset import load_meta, load_split
    from stages.core.loader import open_source
    from stages.core.output import replace_directory, write_json, write_text
    from stages.core.progress import stage_summary

    meta = load_meta()
    split = load_split("train", meta)
    num_processes = device.num_processes(params.runtime)
    where = device.set_up(params.runtime, count=num_processes)
    share = params.train.share(num_processes)
    policy = precision.resolve(params.train.precision, where, params.train.smallest_side)
    network = model.create(params.model, len(meta.classes), params.train.seed)
    model.check_takes(network, params.model.name, [params.train.image_size])
    trainer = engine.create_trainer(network, params.train, policy, where)
    if num_processes > 1:
        trainer.captured = None  # as in train

    with stage_summary("profile") as made, engine.step_errors(params.train, where, lambda: "in the profile"):
        source = open_source(split, where, params.runtime.resident, num_readers(params.runtime))
        recipe = params.train.model_copy(update={"progressive": None, "batch_size": share})  # the step at full size
        batches = _endless_batches(source, meta, recipe, policy.dtype)
        flops = _flops_per_image(trainer, *next(batches))
        # Whose they are: DVC's run cache brings back operators.csv of an earlier run, and not these.
        whose = {
            "model": params.model.name,
            "image_size": params.train.image_size,
            "batch_size": params.train.batch_size,
        }
        numbers: dict[str, Any] = whose | _time_steps(trainer, batches, params, where)
        numbers["peak_memory_mb"] = _peak_memory_mb(where)
        numbers["flops_per_image"] = flops
        trainer.captured = None  # a graph's operators would not be seen
        with replace_directory(PROFILE) as out:
            profiler = _record_steps(trainer, batches, params, where, out)
            write_text(out / "operators.csv", _operator_table(profiler, params.profile.active * params.profile.repeat))
            if params.profile.profile_memory:
                for trace in sorted(out.glob("trace*.json.gz")):
                    _draw_memory(trace, where)
        write_json(METRICS, numbers)
        made.append(f"{numbers['images_per_second']:,.0f} img/s, {numbers['step_ms_p50']:.0f} ms a step of ")
        made[-1] += f"{share} on {where}" + (f" (one of {num_processes} processes)" if num_processes > 1 else "")
        made.append(f"loader {numbers['data_wait_share']:.1%}")
        made.append(f"trace in {PROFILE}")


def _endless_batches(
    source: Source, meta: PackMeta, params: TrainParams, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    from stages.core.loader import training_batches

    epoch = 0
    while True:
        yield from training_batches(source, meta, params, dtype, epoch)
        epoch += 1


def _flops_per_image(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> int:
    """Floating-point operations of forward and backward, a multiply-add counted as two; of one part of the batch."""
    from torch.utils.flop_counter import FlopCounterMode

    part = len(labels) // trainer.grad_accumulation
    images, labels = images[:part], labels[:part]
    with FlopCounterMode(display=False) as counter, trainer.policy.autocast(images.device):
        trainer.loss(trainer.model(images), labels).backward()
    return int(counter.get_total_flops()) // len(labels)


def _time_steps(
    trainer: Trainer, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], params: Params, where: torch.device
) -> dict[str, float]:
    """Wall time of whole steps (loading included) without a profiler in the way, after as many warm-up steps."""
    import numpy as np

    from stages.core.device import synchronize
    from stages.core.engine import train_step
    from stages.core.progress import progress

    num_images, loading, total = 0, [], []
    num_warmup = max(2, params.profile.warmup)
    num_steps = num_warmup + params.profile.timed_steps
    for step in progress(range(num_steps), "profile: time", num_steps, "step"):
        synchronize(where)
        start = time.perf_counter()
        images, labels = next(batches)
        loaded = time.perf_counter()
        train_step(trainer, images, labels, params.train.lr, step)
        synchronize(where)
        if step >= num_warmup:
            loading.append(loaded - start)
            total.append(time.perf_counter() - start)
            num_images += len(labels)
    return {
        "images_per_second": round(num_images / sum(total), 1),
        "step_ms_p50": round(1e3 * float(np.percentile(total, 50)), 2),
        "step_ms_p95": round(1e3 * float(np.percentile(total, 95)), 2),
        "data_wait_share": round(sum(loading) / sum(total), 4),
    }


def _record_steps(
    trainer: Trainer,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    params: Params,
    where: torch.device,
    out: Path,
) -> profile:
    """Run the schedule; write a trace a cycle and the table of operators by time; return the profiler at its end."""
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    from stages.core.engine import train_step
    from stages.core.output import write_text
    from stages.core.progress import progress

    knobs = params.profile
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.type == "cuda" else [])]
    sort_by = "self_device_time_total" if where.type == "cuda" else "self_cpu_time_total"

    def on_cycle(cycle: profile) -> None:
        number = len(list(out.glob("trace*.json.gz"))) + 1
        cycle.export_chrome_trace(str(out / f"trace-{number}.json.gz"))
        table = cycle.key_averages(group_by_input_shape=knobs.record_shapes).table(sort_by=sort_by, row_limit=40)
        write_text(out / "operators.txt", table)

    with profile(
        activities=activities,
        schedule=schedule(wait=knobs.wait, warmup=knobs.warmup, active=knobs.active, repeat=knobs.repeat),
        on_trace_ready=on_cycle,
        record_shapes=knobs.record_shapes,
        profile_memory=knobs.profile_memory,
        with_stack=knobs.with_stack,
        with_flops=knobs.with_flops,
        with_modules=knobs.with_modules,
        acc_events=True,
    ) as profiler:
        num_steps = (knobs.wait + knobs.warmup + knobs.active) * knobs.repeat
        for step in progress(range(num_steps), "profile: record", num_steps, "step"):
            with record_function("load"):
                images, labels = next(batches)
            with record_function("train_step"):
                train_step(trainer, images, labels, params.train.lr, step)
            profiler.step()
    return profiler  # type: ignore[no-any-return]


def _operator_table(profiler: profile, num_steps: int) -> str:
    """CSV of the operators of one step: name, input shapes, calls and FLOPs; all of it repeats from run to run."""
    rows = [
        (event.key, str(event.input_shapes or ""), event.count / num_steps, (event.flops or 0) / num_steps)
        for event in profiler.key_averages(group_by_input_shape=True)
        if event.key.startswith("aten::")
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["operator", "input_shapes", "calls_per_step", "flops_per_step"])
    for name, shapes, calls, flops in sorted(rows, key=lambda row: (-row[3], -row[2], row[0], row[1])):
        writer.writerow([name, shapes, f"{calls:g}", f"{flops:.0f}"])
    return text.getvalue()


def _draw_memory(trace: Path, where: torch.device) -> None:
    """Memory of a device over time, from the allocation events of a trace, as a PNG beside it."""
    from stages.core.figures import memory_timeline
    from stages.core.output import write_bytes

    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("name") == "[memory]"]
    is_host = where.type == "cpu"  # whose number is 0; with a GPU, both allocate
    points = sorted(
        (event["ts"], event["args"]["Total Allocated"])
        for event in events
        if (event["args"]["Device Type"] == 0) == is_host
    )
    if points:
        start = points[0][0]
        figure = memory_timeline([(time_us - start) / 1e3 for time_us, _ in points], [size / 1e6 for _, size in points])
        write_bytes(trace.with_name(trace.name.replace("trace", "memory").replace(".json.gz", ".png")), figure)


def _peak_memory_mb(where: torch.device) -> float:
    """Peak of the CUDA allocator, elsewhere of the process's resident memory; in 10^6 bytes."""
    import torch

    if where.type == "cuda":
        return round(torch.cuda.max_memory_allocated(where) / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


if __name__ == "__main__":
    run_stage(lambda: main(load_params(Params)), "profile")
