"""One optimiser for both models: Muon for matrices, AdamW for the rest, warm-up, slow decay and a cool-down."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from training.rows import Row, batches

CORES = 2
MOMENTUM, DECAY = 0.95, 0.01  # of the matrices


@dataclass(frozen=True)
class Recipe:
    """Size of a training run."""

    steps: int
    tokens: int = 1500  # per half step
    seed: int = 0


def fit(
    name: str,
    model: nn.Module,
    rows: Iterator[Row],
    recipe: Recipe,
    *,
    rate: float,
    loss: Callable[[Sequence[Row], Random], Callable[[], Tensor]],
) -> list[float]:
    """Trains a model on a stream of rows; returns the loss of every step.

    Args:
        name: Of the model, for the news.
        model: What to train.
        rows: Enough of them.
        recipe: How long.
        rate: Learning rate of the matrices; that of the rest is half of it.
        loss: Makes what computes the loss of a batch; draws its chances from the generator.
    """
    optimizer = Optimizer(model, recipe.steps, matrix_rate=rate, other_rate=rate / 2)
    rng, losses = Random(recipe.seed), []
    started = time.monotonic()
    stream = batches(rows, recipe.tokens, rng)
    for step, groups in zip(range(recipe.steps), zip(stream, stream, strict=True), strict=False):
        losses.append(optimizer.step([loss(group, rng) for group in groups]))
        if step % 20 == 19:
            recent = sum(losses[-20:]) / 20
            print(f"{name}: step {step + 1}, loss {recent:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return losses


class Optimizer:
    """Steps all parameters of a model through `steps` updates.

    Each part of a batch runs in a thread of its own on one core. On a busy machine this is much faster than sharing
    every single matrix product between the cores, where each product waits for the slower core.
    """

    def __init__(self, model: nn.Module, steps: int, *, matrix_rate: float, other_rate: float) -> None:
        """Rates are those at the end of the warm-up."""
        named = dict(model.named_parameters())
        matrices = [value for name, value in named.items() if value.ndim == 2 and "layers" in name]
        others = [value for name, value in named.items() if value.ndim != 2 or "layers" not in name]
        self.parameters = [*matrices, *others]
        self.dtype = fastest_dtype()
        self.parts: list[torch.optim.Optimizer] = [
            *(Muon(matrices[core::CORES], matrix_rate, dtype=self.dtype) for core in range(CORES)),
            torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.schedules = [LambdaLR(part, lambda step: _rate(step, steps)) for part in self.parts]
        self.threads = ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,))

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """Descends the mean of the losses, each computed in its own thread, and returns it."""
        results = list(self.threads.map(self._gradients, losses))
        for index, parameter in enumerate(self.parameters):
            parameter.grad = sum((gradients[index] for _, gradients in results), torch.zeros(())) / len(losses)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        list(self.threads.map(lambda part: part.step(), self.parts))
        for schedule in self.schedules:
            schedule.step()
        return sum(loss for loss, _ in results) / len(losses)

    def _gradients(self, loss_of: Callable[[], Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = loss_of()
        return loss.item(), torch.autograd.grad(loss, self.parameters)


class Muon(torch.optim.Optimizer):
    """Momentum for matrices whose singular values are drawn to one: https://kellerjordan.github.io/posts/muon/.

    As torch's own, which computes in bfloat16 only: fifty times slower than float32 where the processor lacks it.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], rate: float, *, dtype: torch.dtype) -> None:
        """Moves elements about as far per step as AdamW at the same rate."""
        super().__init__(matrices, {"lr": rate})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves each matrix against the orthogonal part of its momentum."""
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                ahead = matrix.grad.lerp(momentum, MOMENTUM)
                matrix.mul_(1 - group["lr"] * DECAY)
                matrix.add_(_orthogonal(ahead.to(self.dtype)), alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly, by five Newton–Schulz iterations."""
    a, b, c = 3.4445, -4.775, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def fastest_dtype() -> torch.dtype:
    """Bfloat16 where this processor multiplies it faster than float32, which is measured."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(256, 256, dtype=dtype)
        started = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        return time.perf_counter() - started

    half, full = (min(seconds(dtype) for _ in range(3)) for dtype in (torch.bfloat16, torch.float32))
    return torch.bfloat16 if half < full else torch.float32


def _rate(step: int, steps: int) -> float:
    """Warm-up over 4.5 %, slow decay from then on, and over the last 7/60 linearly to zero."""
    cooling = steps * 53 / 60
    warm, slow = (step + 1) / (0.045 * steps + 1), 1 - min(step, cooling) / (1.5 * steps)
    return min(warm, slow) * min(1.0, max(0.0, (steps - step) / (steps - cooling)))
