"""How long 32 responses take, against ``generate``, against each other and against the least they could take.

Why: ``generate`` copies the prompt to every row before it reads it and carries finished rows along; a search that
decodes many responses to one prompt need not, and the longer the prompt, the more that is worth. What is left to gain
shows beside the matrix products, attention and draws that no implementation can do without. And a search must not eat
up by its own arithmetic what it saves in samples: the default AISP runs against Best-of-N at its fastest, equal numbers
of samples.

Rivals in decoding produce the same number of tokens: no response may end early. Each pair has its own prompt, so
nothing is remembered from the pair before, and the order of the rivals alternates.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    compare_pairs,
    free_reward,
    generate,
    mean_with_interval,
    median_with_interval,
    random_prompt,
    save,
    seconds_of,
    with_interval,
)
from langchain_aisp.align import Aligned, align
from langchain_aisp.demo import scenarios
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine.cache import decoder_config
from langchain_aisp.engine.packed import PackedProducts
from langchain_aisp.engine.transformers import resolve
from langchain_aisp.methods import AISP, BestOfN, PublishedAISP
from langchain_aisp.profiling import TimedMethod, Timeline
from langchain_aisp.sampling import inverse_cdf
from langchain_aisp.types import Chat, Method, Problem, Prompt, Sampling

LONG_PROMPT = 4  # times the prompt
BATCHES = (32, 64, 128, 256, 512)  # rows at once among which Best-of-N may choose

Work = Callable[[Prompt], object]


def rollout(engine: TransformersEngine, method: Method[Any], prompt: Prompt, tokens: int) -> None:
    """One iteration of a method, with a reward that costs nothing."""
    sampling = Sampling(max_tokens=tokens, min_tokens=tokens)
    state = method.init(Problem(prompt, sampling, engine.head))
    wave = method.propose(state)
    rollouts = engine.submit(wave).future.result()
    method.update(state, wave, rollouts, rollouts.tokens.sum(dim=1).float())
    assert rollouts.sampled_tokens == len(wave) * tokens


def compare(name: str, engine: TransformersEngine, one: Work, other: Work, args: argparse.Namespace) -> dict[str, Any]:
    """Ratio of two ways to answer random prompts, after a warm-up."""
    prompts = [random_prompt(engine, args.prompt, number) for number in range(args.pairs)]
    return compare_pairs(name, one, other, prompts, warm_up=random_prompt(engine, args.prompt, 10_000))


# ---------------------------------------------------------------------------------------------------------------------
# The least it could take


class Bound:
    """What decoding needs and nothing else: the weights' products, attention with the prompt once, and the draws.

    For decoders whose layers are linear maps around attention, such as Llama; norms, rotations, additions, caches that
    grow and all bookkeeping cost nothing here.
    """

    def __init__(self, engine: TransformersEngine, rows: int, tokens: int) -> None:
        """Lay out inputs for every product."""
        config = decoder_config(engine.model)
        self.rows, self.tokens = rows, tokens
        self.head = engine.model.get_output_embeddings()
        self.layers = config.num_hidden_layers
        self.heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.products = [
            module for module in engine.model.modules() if isinstance(module, nn.Linear) and module is not self.head
        ]
        self.own = [torch.randn(rows, self.heads, column, self.width) for column in range(1, tokens + 1)]
        self.query = torch.randn(rows, self.heads, self.group, self.width)
        self.uniforms = torch.rand(rows)

    @torch.inference_mode()
    def __call__(self, prompt: Prompt) -> None:
        """Read the prompt once, then give each row its tokens."""
        length = len(prompt.ids)
        read = torch.randn(1, self.heads * self.group, length, self.width)
        self._multiply(length)
        for _ in range(self.layers):
            nn.functional.scaled_dot_product_attention(read, read, read, is_causal=True)
        shared = torch.randn(self.heads, length, self.width)
        hidden = torch.randn(self.rows, self.head.in_features)
        for own in self.own:
            self._multiply(self.rows)
            for _ in range(self.layers):
                self._attend(shared, own)
            inverse_cdf(self.head(hidden).softmax(dim=-1), self.uniforms)

    def _multiply(self, rows: int) -> None:
        inputs = {product.in_features: torch.ones(rows, product.in_features) for product in self.products}
        for product in self.products:
            product(inputs[product.in_features])

    def _attend(self, shared: Tensor, own: Tensor) -> None:
        together = self.query.transpose(0, 1).reshape(self.heads, -1, self.width)
        on_prompt = (together @ shared.transpose(1, 2)).view(self.heads, self.rows, self.group, -1).transpose(0, 1)
        weights = torch.cat([on_prompt, self.query @ own.transpose(2, 3)], dim=-1).softmax(dim=-1)
        length = shared.shape[1]
        weights[..., length:] @ own
        weights[..., :length].transpose(0, 1).reshape(self.heads, -1, length) @ shared


# ---------------------------------------------------------------------------------------------------------------------
# Searches


class Searches:
    """Whole requests with a free reward; remembers what each of them found."""

    def __init__(self, engine: TransformersEngine, samples: int, tokens: int) -> None:
        """Responses end where the model ends them, or after ``tokens``."""
        self.engine = engine
        self.samples = samples
        self.sampling = Sampling(max_tokens=tokens)
        self.reward = free_reward()
        self.found: dict[str, list[Aligned]] = {}
        self.method_shares: list[float] = []

    def run(self, method: Method[Any], item: tuple[int, Chat]) -> None:
        """Answer a numbered conversation."""
        seed, chat = item
        timeline = Timeline(shown=False)
        timeline.start()
        timed = TimedMethod(method, timeline)
        aligned = align(self.engine, self.reward, timed, chat, sampling=self.sampling, seed=seed)
        seconds = timeline.stop()
        self.found.setdefault(method.name, []).append(aligned)
        if method.name == "aisp":
            self.method_shares.append(seconds["method"] / sum(seconds.values()))

    def best_of_n(self, batch: int) -> BestOfN:
        """Best-of-N that decodes so many rows at once."""
        return BestOfN(self.samples, samples_per_wave=batch)

    def fastest_batch(self, items: Sequence[tuple[int, Chat]]) -> tuple[int, dict[int, float]]:
        """The number of rows at once with the least median seconds, and the medians of all."""
        batches = [batch for batch in BATCHES if batch <= self.samples] or [self.samples]
        seconds = {
            batch: median(seconds_of(partial(self.run, self.best_of_n(batch), item)) for item in items)
            for batch in batches
        }
        return min(seconds, key=lambda batch: seconds[batch]), seconds


def aisp_to_best_of_n(name: str, engine: TransformersEngine, samples: int, args: argparse.Namespace) -> dict[str, Any]:
    """The default search against Best-of-N at its fastest, equal numbers of samples, on the demo's conversations."""
    searches = Searches(engine, samples, args.tokens)
    items = [(number, one.messages) for number, one in enumerate(scenarios("test", args.pairs + 4, seed=2))]
    searches.run(searches.best_of_n(min(BATCHES)), items[-1])  # warm-up
    batch, tried = searches.fastest_batch(items[-3:])
    searches.found.clear()
    method = AISP(samples=samples)
    result = compare_pairs(
        f"{name}: AISP / Best-of-N, {batch} rows at once, {samples} samples each",
        lambda item: searches.run(method, item),
        lambda item: searches.run(searches.best_of_n(batch), item),
        items[: args.pairs],
    )
    shares = median_with_interval(searches.method_shares)
    print(f"{name}: AISP's own arithmetic, share of the request: {with_interval(shares)}", flush=True)
    return {
        **result,
        "best_of_n_rows_at_once": batch,
        "best_of_n_seconds_by_rows": tried,
        "costs": {method: costs(found) for method, found in searches.found.items()},
        "method_share": shares,
    }


def searches_to_best_of_n(name: str, engine: TransformersEngine, args: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """The same by each number of samples."""
    return {samples: aisp_to_best_of_n(name, engine, samples, args) for samples in args.samples}


def costs(found: Sequence[Aligned]) -> dict[str, Any]:
    """What searches spent, per request."""
    names = ("samples", "sampled_tokens", "seconds", "reward_seconds")
    return {name: mean_with_interval([float(getattr(aligned, name)) for aligned in found]) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# vLLM, where it is installed


def open_vllm(path: str, rows: int, tokens: int) -> Work | None:
    """The same work by vLLM; None where that is not installed."""
    try:
        import vllm
    except ImportError:
        return None
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    model = vllm.LLM(model=resolve(path), dtype="float32", enforce_eager=True, max_num_seqs=rows)
    sampling = vllm.SamplingParams(n=rows, temperature=1.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True)

    def work(prompt: Prompt) -> None:
        [output] = model.generate([{"prompt_token_ids": list(prompt.ids)}], sampling, use_tqdm=False)
        assert [len(each.token_ids) for each in output.outputs] == [tokens] * rows

    return work


# ---------------------------------------------------------------------------------------------------------------------


def measure(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """All comparisons on one model."""
    name = Path(path).name
    longer = argparse.Namespace(**{**vars(args), "prompt": LONG_PROMPT * args.prompt})
    plain = BestOfN(args.rows, samples_per_wave=args.rows)
    published = PublishedAISP(samples_per_iteration=args.rows, iterations=1)
    with TransformersEngine.from_pretrained(path, device="cpu") as engine:
        if args.searches:
            return {"aisp_to_best_of_n": searches_to_best_of_n(name, engine, args)}

        def ours(prompt: Prompt) -> None:
            rollout(engine, plain, prompt, args.tokens)

        def steered(prompt: Prompt) -> None:
            rollout(engine, published, prompt, args.tokens)

        def theirs(prompt: Prompt) -> None:
            generate(engine, prompt, args.rows, args.tokens)

        bound = Bound(engine, args.rows, args.tokens)
        packed = PackedProducts(engine.model)

        def packed_bound(prompt: Prompt) -> None:
            with packed.installed():
                bound(prompt)

        results: dict[str, Any] = {
            "rollouts_to_generate": compare(f"{name}: our rollouts / generate", engine, ours, theirs, args),
            "published_to_best_of_n": compare(f"{name}: published AISP / our Best-of-N", engine, steered, ours, args),
            f"rollouts_to_generate_prompt_{longer.prompt}": compare(
                f"{name}: our rollouts / generate, {longer.prompt}-token prompt", engine, ours, theirs, longer
            ),
            "rollouts_to_bound": compare(f"{name}: our rollouts / torch's bare products", engine, ours, bound, args),
            "rollouts_to_packed_bound": compare(
                f"{name}: our rollouts / our bare products", engine, ours, packed_bound, args
            ),
            "aisp_to_best_of_n": searches_to_best_of_n(name, engine, args),
        }
        vllm = open_vllm(path, args.rows, args.tokens)
        if vllm is None:
            print(f"{name}: vLLM is not installed")
        results["rollouts_to_vllm"] = (
            "not installed" if vllm is None else compare(f"{name}: our rollouts / vLLM", engine, ours, vllm, args)
        )
    return results


def main() -> None:
    """Run the pairs and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], help="ids or folders of models")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens; four times as many in the long one")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per row")
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 256], help="responses of a whole search")
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--searches", action="store_true", help="only whole searches: AISP against Best-of-N")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {Path(path).name: measure(path, args) for path in args.models}
    settings = {"rows": args.rows, "prompt_tokens": args.prompt, "new_tokens": args.tokens, "samples": args.samples}
    save("speed-searches" if args.searches else "speed", {**settings, "models": results})


if __name__ == "__main__":
    main()
