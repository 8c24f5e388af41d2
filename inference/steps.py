"""One step of cached decoding: the transformer's blocks and its head, run as they are, or as CUDA graphs.

A step's time on a GPU is that of starting its some 400 kernels. A CUDA graph starts them all at once, but for fixed shapes and addresses
only: there is one for each (tokens, cached length) that a clip goes through, T x K of them, or (w + 1) x K with a window of w frames. They
are captured in the first clip of a shape and replayed in all later ones, with attention over exactly what is cached. A shape is the grids,
the number of frames, the window, the rows of the batch, and the text's length, which the decoder therefore pads to few values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from inference.cache import KeyValueCache
from inference.config import ModelConfig
from inference.model import Rotary, VideoARTransformer
from tokenizer.sequence import SequenceLayout

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes work on fixed tensors; gives what does the work again and where its result then lies."""


class Steps:
    """Runs the steps of one clip, or of a batch of them.

    Args:
        model: the network.
        cache: an empty one.
    """

    def __init__(self, model: VideoARTransformer, cache: KeyValueCache):
        self.model, self.cache = model, cache

    def __call__(self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, count: int) -> Tensor:
        """Adds n tokens to the cache.

        Args:
            hidden: embedded tokens, [B, n, h].
            rotary: cos and sin of their positions, [B, n, D/2] each.
            mask: bool, broadcasts to [B, 1, n, length + n]; None: all that is cached is visible.
            count: how many of the last tokens' logits are wanted.

        Returns:
            float32 [B, count, d], until the next step.
        """
        logits = self._run(hidden, rotary, mask, count)
        self.cache.advance(hidden.shape[1])
        return logits

    def _run(self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, count: int) -> Tensor:
        hidden = self.model.transform(hidden, rotary, mask, self.cache)
        return self.model.logits(hidden[:, -count:])


class GraphSteps(Steps):
    """The same with graphs, which belong to this cache's memory and outlive the clip."""

    def __init__(self, model: VideoARTransformer, cache: KeyValueCache, capture: Capture):
        super().__init__(model, cache)
        self._capture = capture
        self._captured: dict[tuple, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def _run(self, hidden: Tensor, rotary: Rotary, mask: Tensor | None, count: int) -> Tensor:
        inputs = [hidden, *rotary] + ([] if mask is None else [mask])
        key = (self.cache.length, count, *(tuple(value.shape) for value in inputs))
        if key not in self._captured:
            with torch.inference_mode(False):  # a later clip may be decoded outside of it
                fixed = [torch.empty_like(value) for value in inputs]
            for mine, value in zip(fixed, inputs):
                mine.copy_(value)  # the work is tried before its capture
            run, own_mask = super()._run, fixed[3] if mask is not None else None
            replay, logits = self._capture(lambda: run(fixed[0], (fixed[1], fixed[2]), own_mask, count))
            self._captured[key] = fixed, replay, logits
        fixed, replay, logits = self._captured[key]
        for mine, value in zip(fixed, inputs):
            mine.copy_(value)
        replay()
        return logits


class StepGraphs:
    """The graphs of a network, by the shape of what is decoded; a cache and its graphs serve one clip at a time.

    Args:
        most: caches that are kept while no clip uses them.
        capture: see `Capture`.
    """

    def __init__(self, most: int = 2, capture: Capture | None = None):
        self.most, self._capture = most, capture or CudaCapture()
        self._free: list[tuple[tuple, GraphSteps]] = []

    def lend(self, model: VideoARTransformer, shape: tuple, make: Callable[[], KeyValueCache], user: object) -> Steps:
        """A cache and its graphs, until `user` is gone.

        Args:
            model: the network.
            shape: clips with the same one may follow each other in a cache.
            make: gives a new cache.
            user: what uses it.
        """
        steps = next((steps for known, steps in self._free if known == shape), None)
        if steps is None:
            # before the new one is made: memory may be short
            del self._free[: max(0, len(self._free) + 1 - self.most)]
            steps = GraphSteps(model, make(), self._capture)
        else:
            self._free = [entry for entry in self._free if entry[1] is not steps]
            steps.cache.reset()
        weakref.finalize(user, self._free.append, (shape, steps))
        return steps


class CudaCapture:
    """Captures by torch.cuda.graph. All graphs share one pool of memory: they never run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # what is compiled or chosen at a first call must be so before the capture
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as a server's, may use the GPU meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


def decoding_steps(
    model: VideoARTransformer, layout: SequenceLayout, window: int | None, batch: int, user: object
) -> Steps:
    """What runs the steps of a batch of clips: graphs where the network was prepared for them (`fast.prepare`).

    Args:
        model: the network.
        layout: the sequence; its text length is the cached one.
        window: earlier frames that stay visible; None: all.
        batch: rows, both branches of the guidance counted.
        user: who decodes; when it is gone another may take its cache.
    """
    config: ModelConfig = model.config

    def make() -> KeyValueCache:
        with torch.inference_mode(False):
            return KeyValueCache(config, layout, window, batch, model.head.weight)

    if model.graphs is None:
        return Steps(model, make())
    shape = (layout.text_length, layout.schedule.scales, layout.context_block, layout.num_frames, window, batch)
    return model.graphs.lend(model, shape, make, user)
