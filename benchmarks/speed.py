"""How long 32 responses take: our rollouts against ``generate``, and published AISP against our Best-of-N.

Why: ``generate`` copies the prompt to every row before it reads it and carries finished rows along; a search that
decodes many responses to one prompt need not. All rivals decode the same number of tokens: no response may end early.
Each pair has its own prompt, so nothing is remembered from the pair before, and the order of the rivals alternates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import median_with_interval, save
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.methods import BestOfN, PublishedAISP
from langchain_aisp.noise import fold, request_key, uniform
from langchain_aisp.types import Method, Problem, Prompt, Sampling


def random_prompt(engine: TransformersEngine, length: int, seed: int) -> Prompt:
    """A prompt of arbitrary words: speed does not depend on sense."""
    words = len(engine.tokenizer) - 64
    ids = tuple((32 + uniform(fold(seed, torch.arange(length))) * words).long().tolist())
    return Prompt(({"role": "user", "content": "…"},), ids, request_key(seed, ids))


def rollout(engine: TransformersEngine, method: Method, prompt: Prompt, tokens: int) -> None:
    """One iteration of a method, with a reward that costs nothing."""
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
    state = method.init(Problem(prompt, sampling, engine.head))
    wave = method.propose(state)
    rollouts = engine.submit(wave).future.result()
    method.update(state, wave, rollouts, rollouts.tokens.sum(dim=1).float())
    assert rollouts.sampled_tokens == len(wave) * tokens


def generate(engine: TransformersEngine, prompt: Prompt, tokens: int, rows: int) -> None:
    """The same work by transformers' own generate."""
    output = engine.model.generate(
        torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        num_return_sequences=rows,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    engine.tokenizer.batch_decode(output[:, len(prompt.ids) :], skip_special_tokens=True)
    assert output.shape == (rows, len(prompt.ids) + tokens)


def pair(one: Callable[[Prompt], None], other: Callable[[Prompt], None], prompt: Prompt, swap: bool) -> list[float]:
    """Seconds of both, run one right after the other."""
    seconds = [0.0, 0.0]
    for which in (1, 0) if swap else (0, 1):
        start = time.perf_counter()
        (one, other)[which](prompt)
        seconds[which] = time.perf_counter() - start
    return seconds


def compare(
    name: str,
    engine: TransformersEngine,
    one: Callable[[Prompt], None],
    other: Callable[[Prompt], None],
    args: argparse.Namespace,
) -> dict[str, object]:
    """Ratio of the two over all pairs, after a warm-up."""
    pair(one, other, random_prompt(engine, args.prompt, 10_000), swap=False)
    seconds = [pair(one, other, random_prompt(engine, args.prompt, i), swap=bool(i % 2)) for i in range(args.pairs)]
    ratio = median_with_interval([a / b for a, b in seconds])
    print(
        f"{name}: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] over {args.pairs} pairs", flush=True
    )
    return {"ratio": ratio, "seconds": seconds}


def main() -> None:
    """Run the pairs and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], help="ids or folders of models")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per row")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for path in args.models:
        engine = TransformersEngine.from_pretrained(path, device="cpu")
        plain = BestOfN(args.rows, samples_per_wave=args.rows)
        published = PublishedAISP(samples_per_iteration=args.rows, iterations=1)

        def ours(prompt: Prompt, engine: TransformersEngine = engine, method: Method = plain) -> None:
            rollout(engine, method, prompt, args.tokens)

        def steered(prompt: Prompt, engine: TransformersEngine = engine, method: Method = published) -> None:
            rollout(engine, method, prompt, args.tokens)

        def theirs(prompt: Prompt, engine: TransformersEngine = engine) -> None:
            generate(engine, prompt, args.tokens, args.rows)

        label = Path(path).name
        results[label] = {
            "rollouts_to_generate": compare(f"{label}: our rollouts / generate", engine, ours, theirs, args),
            "published_to_best_of_n": compare(f"{label}: published AISP / our Best-of-N", engine, steered, ours, args),
        }
        engine.close()
    settings = {"rows": args.rows, "prompt_tokens": args.prompt, "new_tokens": args.tokens}
    save("speed", {**settings, "models": results})


if __name__ == "__main__":
    main()
