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
        self.parts: list[torch.optim.Optimizer] = [
            *(_muon(matrices[core::CORES], matrix_rate) for core in range(CORES)),
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
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of()
        return loss.item(), torch.autograd.grad(loss, self.parameters)


def _muon(matrices: list[nn.Parameter], rate: float) -> torch.optim.Muon:
    return torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")


def _rate(step: int, steps: int) -> float:
    """Warm-up over 4.5 %, slow decay from then on, and over the last 7/60 linearly to zero."""
    cooling = steps * 53 / 60
    warm, slow = (step + 1) / (0.045 * steps + 1), 1 - min(step, cooling) / (1.5 * steps)
    return min(warm, slow) * min(1.0, max(0.0, (steps - step) / (steps - cooling)))
