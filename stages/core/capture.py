"""The train step as a CUDA graph: recorded once, then launched as one, so that the host's work vanishes.

Needs that nothing in the step reads from the device, and that learning rate and step counts are tensors
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). Elsewhere the step simply runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

_NUM_WARMUP = 3  # steps on a side stream, in which libraries choose algorithms and take their memory


class CapturedStep:
    """Calls `step(images, labels)`, a loss (0-d) that may stay on the device, by replaying a CUDA graph of it.

    A graph is recorded for each shape of the images (progressive resizing has several); they share their memory.
    Warming up runs real steps, so `state` lists all tensors that a step changes, and they are put back afterwards.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], state: Callable[[], list[Tensor]]) -> None:
        self._step = step
        self._state = state
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self.seconds = 0.0  # spent on warming up and recording

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run one step."""
        if images.shape not in self._graphs:
            self._graphs[images.shape] = self._record(images, labels)
        graph, own_images, own_labels, loss = self._graphs[images.shape]
        own_images.copy_(images)
        own_labels.copy_(labels)
        graph.replay()
        return loss.clone()

    def _record(self, images: Tensor, labels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        torch.cuda.synchronize(images.device)
        start = time.perf_counter()
        images, labels = images.clone(memory_format=torch.preserve_format), labels.clone()
        # Detached: a clone that autograd knows of would keep the gradients' nodes of the present stream alive, and a
        # backward pass that meets them cannot be recorded on another.
        before = {id(tensor): tensor.detach().clone() for tensor in self._state()}
        random_state = torch.cuda.get_rng_state(images.device)  # that dropout draws from, also in the warm-up
        stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARMUP):
                self._step(images, labels)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        # thread_local: the threads that read ahead may go on taking pinned memory.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = self._step(images, labels)
        with torch.no_grad():
            for tensor in self._state():  # what the first step made (momenta, step counts) starts from zero
                tensor.copy_(before[id(tensor)]) if id(tensor) in before else tensor.zero_()
        torch.cuda.set_rng_state(random_state, images.device)
        torch.cuda.synchronize(images.device)
        self.seconds += time.perf_counter() - start
        return graph, images, labels, loss
