"""Peak memory of a request on a CPU, above the weights, their packed copy, and the keys and values.

Why: what remains is the price of the method and the engine: libraries, logits, observations for the search, copies.
It must stay below 1 GiB whatever the model. Each request runs in a process of its own, because a process does not give
back what others have taken; the peak is the kernel's own count of resident memory, which sees what torch allocates.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import MIB, cache_bytes, free_reward, save, weight_bytes
from benchmarks.grammar import random_llama
from langchain_aisp.align import align
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import AISP, BestOfN, PublishedAISP
from langchain_aisp.types import Chat, Method, Sampling

BOUND = 1024 * MIB
METHODS = ("best_of_n", "published_aisp", "aisp", "aisp_with_control")


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        model: Id or folder of a model, or the size of a random-weight Llama's vocabulary.
        method: One of ``METHODS``.
        rows: Rows per wave.
        iterations: Waves.
        prompt: Least length of the prompt, in tokens.
        tokens: New tokens per row.
        threads: Of torch.
    """

    model: str
    method: str
    rows: int
    iterations: int
    prompt: int
    tokens: int
    threads: int

    def load(self) -> TransformersEngine:
        """The model on the CPU, in float32."""
        if self.model.isdigit():
            return random_llama(int(self.model))
        return TransformersEngine.from_pretrained(self.model, device="cpu")

    def search(self) -> Method[Any]:
        """The method with its sizes."""
        samples = self.rows * self.iterations
        if self.method == "best_of_n":
            return BestOfN(samples, samples_per_wave=self.rows)
        if self.method == "published_aisp":
            return PublishedAISP(samples_per_iteration=self.rows, iterations=self.iterations)
        return AISP(samples, self.iterations, control_kl=0.01 if self.method == "aisp_with_control" else 0.0)


def measure(case: Case) -> dict[str, Any]:
    """Bytes of one request; to be called in a process that has done nothing before."""
    torch.set_num_threads(case.threads)
    libraries = resident("VmRSS")
    with case.load() as engine:
        loaded = resident("VmRSS")
        forget_peak()
        sampling = Sampling(max_tokens=case.tokens, min_tokens=case.tokens)
        found = align(engine, free_reward(), case.search(), long_chat(engine, case.prompt), sampling=sampling)
        peak = resident("VmHWM")
        weights, packed = weight_bytes(engine.model), engine.packed.size
        keys = cache_bytes(engine.model, case.rows, found.prompt_tokens, case.tokens)
    return {
        **asdict(case),
        "prompt": found.prompt_tokens,
        "peak": peak,
        "weights": weights,
        "packed_weights": packed,
        "keys_and_values": keys,
        "libraries": libraries,
        "above": peak - weights - packed - keys,
        "taken_by_the_request": peak - loaded - keys,
    }


def resident(field: str) -> int:
    """Resident bytes of this process now (``VmRSS``) or at most so far (``VmHWM``), as Linux counts them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return next(1024 * int(words[1]) for words in lines if words[0] == f"{field}:")


def forget_peak() -> None:
    """Let the peak begin anew: what loading took for a moment is not the request's."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def long_chat(engine: TransformersEngine, tokens: int) -> Chat:
    """A conversation of at least so many tokens."""
    chat = [{"role": "user", "content": ""}]
    while len(engine.tokenize(chat)) < tokens:
        chat[0]["content"] += "My parcel is late. "
    return chat


def measure_alone(case: Case) -> dict[str, Any]:
    """``measure`` in a process of its own; printed and held against the bound."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(measure, (case,))
    shown = ", ".join(f"{name} {found[name] / MIB:.0f}" for name in ("peak", "weights", "keys_and_values", "above"))
    print(f"{case.model}, {case.method}: {shown} MiB (libraries {found['libraries'] / MIB:.0f})", flush=True)
    assert found["above"] <= BOUND, f"{case} takes {found['above'] / MIB:.0f} MiB above weights, keys and values"
    return found


def main() -> None:
    """Measure every model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo", "131072"], help="ids, folders, or sizes of vocabularies")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per row")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    cases = [
        Case(model, method, args.rows, args.iterations, args.prompt, args.tokens, args.threads)
        for model in args.models
        for method in args.methods
    ]
    save("memory", {"bound": BOUND, "requests": [measure_alone(case) for case in cases]})


if __name__ == "__main__":
    main()
