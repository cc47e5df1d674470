"""The benchmarks at tiny sizes: that they run, count right and end with one line of JSON. No time is asserted."""

import json
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import (
    arithmetic,
    common,
    concurrency,
    drafts,
    gpu,
    grammar,
    memory,
    overlap,
    plots,
    scaling,
    speed,
    tools,
)
from langchain_aisp.engine import TransformersEngine
from langchain_aisp.engine import transformers as engines
from tests import tiny

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls a benchmark's ``main`` and returns its last line, which must be what it has saved."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    threads = torch.get_num_threads()

    def call(module: types.ModuleType, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *arguments])
        module.main()
        torch.set_num_threads(threads)
        last = json.loads(capsys.readouterr().out.splitlines()[-1])
        [saved] = tmp_path.glob("*.json")
        assert saved.name == f"{last['date']}-{last['benchmark']}.json"
        assert json.loads(saved.read_text()) == last
        return last

    return call


@pytest.fixture
def engine():
    with TransformersEngine(tiny.model(), tiny.tokenizer(), name="tiny") as engine:
        yield engine


def test_the_slope_of_a_power_is_its_exponent() -> None:
    seconds = [[0.5 * size**1.5 for size in (2, 4, 8, 16)], [0.7 * size**1.5 for size in (2, 4, 8, 16)]]
    found = common.exponent([2, 4, 8, 16], seconds)
    assert (found["median"], found["low"], found["high"]) == pytest.approx((1.5, 1.5, 1.5))


def test_rounds_run_each_work_once_per_round_with_a_new_number_and_by_turns_backwards() -> None:
    done: list[tuple[str, int]] = []
    seconds = common.rounds([lambda number, name=name: done.append((name, number)) for name in "ab"], 2)
    assert done == [("b", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 2)]
    assert [len(row) for row in seconds] == [2, 2]


def test_rivals_swap_places_from_pair_to_pair() -> None:
    done: list[str] = []
    found = common.compare_pairs("x", lambda n: done.append(f"a{n}"), lambda n: done.append(f"b{n}"), [0, 1, 2])
    assert done == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert found["ratio"]["pairs"] == 3


def test_rows_of_a_benchmark_last_for_all_their_tokens(engine) -> None:
    assert common.decode(engine, common.random_prompt(engine, 5, 1), 4, 3).lengths.tolist() == [3] * 4


def test_sizes_of_weights_and_keys_are_those_of_the_tensors(engine) -> None:
    model = engine.model
    assert common.weight_bytes(model) == 4 * sum(parameter.numel() for parameter in model.parameters())
    cache = model(input_ids=torch.zeros(3, 7, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert common.cache_bytes(model, rows=3, prompt=0, tokens=7) == held
    assert common.cache_bytes(model, rows=3, prompt=5, tokens=7) == held + 5 * common.cache_bytes_per_token(model)


def test_the_free_reward_tells_texts_apart_and_nothing_else() -> None:
    scores = common.free_reward().fn([], ["a", "b", "a"])
    assert scores[0] == scores[2] != scores[1]


def test_speed_compares_every_rival(run: Run) -> None:
    sizes = ("--rows", "4", "--prompt", "8", "--tokens", "4", "--samples", "8", "12", "--pairs", "2")
    [found] = run(speed, "demo", *sizes)["models"].values()
    rivals = {"rollouts_to_generate", "rollouts_to_generate_prompt_32", "published_to_best_of_n"}
    rivals |= {"rollouts_to_bound", "rollouts_to_packed_bound"}
    searches = {int(samples): search for samples, search in found["aisp_to_best_of_n"].items()}
    assert set(searches) == {8, 12}
    for compared in (*(found[name] for name in rivals), *searches.values()):
        assert compared["ratio"]["median"] > 0
        assert len(compared["seconds"]) == 2
    for samples, search in searches.items():
        spent = {name: costs["samples"]["mean"] for name, costs in search["costs"].items()}
        assert spent == {"aisp": samples, "best_of_n": samples}
        assert search["costs"]["aisp"]["sampled_tokens"]["mean"] <= samples * 4
        assert 0 < search["method_share"]["median"] < 1
    assert found["rollouts_to_vllm"] == "not installed"


def test_best_of_n_is_compared_at_the_rows_that_were_fastest(monkeypatch: pytest.MonkeyPatch, engine) -> None:
    searches = speed.Searches(engine, samples=128, tokens=4)
    waits = {32: 3.0, 64: 1.0, 128: 2.0}
    monkeypatch.setattr(searches, "run", lambda method, item: waits[method.samples_per_wave])
    monkeypatch.setattr(speed, "seconds_of", lambda work: work())
    assert searches.fastest_batch([(0, []), (1, [])]) == (64, waits)


def test_the_bound_does_the_products_of_the_model_and_no_more(engine) -> None:
    model, seen = engine.model, []
    hooks = [
        module.register_forward_hook(lambda module, given, _: seen.append((id(module), len(given[0].flatten(0, -2)))))
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    prompt = common.random_prompt(engine, 64 + 1, 3)  # whole pieces, so that none is padded
    common.decode(engine, prompt, 4, 3)
    ours = seen.copy()
    speed.Bound(engine, 4, 3)(prompt)
    bare = seen[len(ours) :]
    for hook in hooks:
        hook.remove()
    head = id(model.get_output_embeddings())
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules()) - 1
    assert sum(rows for module, rows in ours if module != head) == linears * (64 + 3 * 4)
    assert sum(rows for module, rows in bare if module != head) == linears * (
        65 + 3 * 4
    )  # the prompt's last token, too
    assert sum(rows for module, rows in bare if module == head) == 3 * 4


def test_vllm_is_asked_for_the_same_work_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, engine) -> None:
    asked: list[Any] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            asked.append(options)

        def generate(self, prompts, sampling, use_tqdm):
            asked.append((prompts, vars(sampling)))
            outputs = [types.SimpleNamespace(token_ids=[0] * sampling.max_tokens)] * sampling.n
            return [types.SimpleNamespace(outputs=outputs)]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    work = speed.open_vllm("demo", rows=3, tokens=5)
    prompt = common.random_prompt(engine, 6, 1)
    work(prompt)
    assert asked[0]["model"] == engines.resolve("demo")
    [given], sampling = asked[1]
    assert given == {"prompt_token_ids": list(prompt.ids)}
    assert (sampling["n"], sampling["max_tokens"], sampling["min_tokens"]) == (3, 5, 5)


def test_concurrency_gives_every_caller_the_same_answer(run: Run) -> None:
    found = run(concurrency, "--callers", "1", "3", "--rows", "4", "--tokens", "6", "--pairs", "2")["gains"]
    assert [(each["callers"], each["rows"], each["answers_identical"]) for each in found] == [
        (1, 4, True),
        (3, 4, True),
    ]


def test_arithmetic_compares_every_setting_with_the_first(run: Run) -> None:
    [found] = run(arithmetic, "--threads", "1", "2", "--rows", "4", "--tokens", "2", "--rounds", "2")["waves"]
    assert list(found["ratios"]) == [f"{n} threads, {way}" for n in (1, 2) for way in arithmetic.WAYS]
    assert found["ratios"]["1 threads, float32"]["median"] == 1.0
    assert [len(row) for row in found["seconds"]] == [8, 8]


def test_grammar_compares_seconds_per_token(run: Run) -> None:
    sizes = ("--rows", "4", "--tokens", "4", "--pairs", "2", "--random-pairs", "2", "--vocabularies", "4096")
    last = run(grammar, *sizes)
    assert last["trained"]["demo"]["vocabulary"] == 3072
    ratios = (last["trained"]["demo"]["drawn"], last["trained"]["demo"]["observed"], last["random"]["4096"])
    assert all(each["ratio"]["pairs"] == 2 and each["ratio"]["low"] > 0 for each in ratios)


def test_a_ratio_per_token_counts_the_tokens_of_each_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "seconds_of", lambda work: (work(), 6.0)[1])
    found = grammar.per_token("ours / theirs", lambda _: 2, lambda _: 4, ["one", "two"], "warm-up")
    assert found["ratio"]["median"] == pytest.approx(2.0)
    assert found["seconds_per_token"] == [[3.0, 1.5]] * 2


def test_scoring_ahead_gives_the_same_answers(run: Run) -> None:
    sizes = ("--rows", "4", "--waves", "2", "--tokens", "8", "--seconds", "0.001", "--at-once", "2", "--pairs", "2")
    [found] = run(overlap, *sizes)["judges"]
    assert found["at_once"] == 2
    assert found["ratio"]["pairs"] == found["waiting_for_reward"]["ahead"]["pairs"] == 2


def test_concurrency_fails_when_an_answer_changes(monkeypatch: pytest.MonkeyPatch, engine) -> None:
    given = iter(range(100))
    monkeypatch.setattr(concurrency.Callers, "ask", lambda self, request: next(given))
    args = types.SimpleNamespace(tokens=4, pairs=1)
    with pytest.raises(AssertionError, match="2 callers with 4 rows"):
        concurrency.gain((engine, engine), callers=2, rows=4, args=args)


def test_scaling_fits_every_size_and_shows_that_the_prompt_is_read_once(run: Run) -> None:
    sizes = ["--rows", "4", "8", "--iterations", "1", "2", "--tokens", "2", "4", "--prompts", "65", "129"]
    few = ["--vocabularies", "512", "1024", "--fixed-rows", "4", "--fixed-tokens", "2", "--rounds", "2"]
    found = run(scaling, *sizes, *few)
    samples = {"samples, 4 at once", "samples, all at once"}
    assert set(found["growth"]) == samples | {"iterations", "tokens", "prompt", "vocabulary"}
    assert all(each["exponent"]["pairs"] == 2 for each in found["growth"].values())
    once = found["prompt_once"]
    assert once["tokens_read"] == {"4": 128, "32": 128}
    assert once["tokens_read_by_generate"] == {"4": 4 * 129 - 4, "32": 32 * 129 - 32}


def test_what_a_long_prompt_adds_is_compared_between_few_rows_and_many() -> None:
    found = scaling.added_by_prompt([[1.0, 3.0, 2.0, 6.0]] * 3)
    assert [found[name]["median"] for name in ("few", "many", "ratio")] == [2, 4, 2]


def test_memory_is_measured_in_a_process_of_its_own(run: Run) -> None:
    sizes = ("--rows", "4", "--iterations", "1", "--prompt", "16", "--tokens", "4")
    [found] = run(memory, "512", "--methods", "best_of_n", *sizes)["requests"]
    assert found["prompt"] >= 16
    assert found["packed_weights"] > 0
    parts = ("weights", "packed_weights", "keys_and_values", "above")
    assert 0 < sum(found[part] for part in parts) == found["peak"]
    assert found["above"] <= memory.BOUND


def test_memory_beyond_the_bound_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BOUND", -1)
    monkeypatch.setattr(memory.multiprocessing, "get_context", lambda _: types.SimpleNamespace(Pool=InThisProcess))
    with pytest.raises(AssertionError, match="above weights"):
        memory.measure_alone(memory.Case("512", "aisp_with_control", 4, 2, 16, 4, threads=1))


class InThisProcess:
    """A pool that is none."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def apply(self, function, arguments):
        return function(*arguments)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts the peak")
def test_the_peak_is_that_of_the_work_and_not_of_what_came_before() -> None:
    """In a process of its own: here an earlier test may have left memory that is taken again."""
    lines = (
        "import torch",
        "from benchmarks import memory",
        "torch.ones(64 << 18)",
        "memory.forget_peak()",
        "before = memory.resident('VmRSS')",
        "torch.ones(32 << 18)",
        "print(memory.resident('VmHWM') - before)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert 24 * common.MIB < int(found.split()[-1]) < 56 * common.MIB


@pytest.mark.parametrize("method", memory.METHODS)
def test_every_method_of_the_memory_benchmark_spends_its_rows_and_waves(method: str) -> None:
    search = memory.Case("demo", method, rows=8, iterations=2, prompt=1, tokens=4, threads=1).search()
    assert search.iterations == 2
    assert getattr(search, "samples", None) in (16, None)


def test_the_gpu_benchmark_runs_its_tiny_shape_on_a_cpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = ("--rows", "1", "8", "--crowd-rows", "4", "--prompt", "16", "--tokens", "4", "--pairs", "2")
    found = run(gpu, "--shape", "tiny", *sizes)
    assert set(found["floors"]) == set(found["modes"]["eager"]["by_rows"]) == {"1", "8"}
    eager = found["modes"]["eager"]
    for rows in ("1", "8"):
        assert {"ours", "generate", "memory"} <= set(eager["by_rows"][rows])
    assert eager["compilations_after_warm_up"] == 0
    assert eager["crowd"]["throughput"]["median"] > 0
    assert eager["graphs_recorded_after_warm_up"] == 0
    assert found["modes"]["graphs"] == gpu.NOT_AVAILABLE


def test_the_large_shape_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--shape tiny runs on a CPU" in capsys.readouterr().err


def test_graphs_are_not_available_on_a_cpu_or_where_the_engine_has_no_such_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert gpu.modes(cpu) == {"eager": {}, "graphs": None}
    assert gpu.modes(cuda) == {"eager": {"cuda_graphs": False}, "graphs": {"cuda_graphs": True}}
    monkeypatch.setattr(gpu, "TransformersEngine", lambda model, tokenizer: None)
    assert gpu.modes(cuda) == {"eager": {}, "graphs": None}


def test_graphs_that_are_recorded_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    class Graph:
        def capture_begin(self, pool: str) -> None:
            begun.append(pool)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    before = Graph.capture_begin
    with gpu.counting_recordings() as recorded:
        Graph().capture_begin("one")
        Graph().capture_begin(pool="two")
    assert Graph.capture_begin is before
    assert (len(recorded), begun) == (2, ["one", "two"])


def test_the_floor_of_llama_3_8b_is_that_of_the_arithmetic() -> None:
    """15.0 GB of weights and, with prompts copied to 32 rows, 1.34 GB of keys and values at 4.3 TB/s: 3.8 ms."""
    with torch.device("meta"):
        model = gpu.LlamaForCausalLM(gpu.LlamaConfig(**gpu.SHAPES["llama-3-8b"])).to(torch.bfloat16)
    least = gpu.floor(model, rows=32, prompt=256, tokens=128, bandwidth=4.3e12, rate=790e12)
    assert least["weight_bytes"] == pytest.approx(15.0e9, rel=0.01)
    assert least["by_memory_per_row"] == pytest.approx(3.80e-3, rel=0.01)
    assert least["by_products"] == pytest.approx(0.61e-3, rel=0.01)
    assert least["seconds"] == least["by_memory"] < least["by_memory_per_row"]
    assert gpu.floor(model, 256, 256, 128, 4.3e12, 790e12)["seconds"] > least["by_products"] * 8 * 0.99


def test_drafts_counts_what_repeats_an_earlier_response_with_the_same_beginning() -> None:
    earlier = [[1, 2, 3, 4, 5], [1, 2, 9, 4], [7, 2, 3, 4, 6, 8]]
    assert drafts.repeated(3, [1, 2, 8, 4, 5, 6], earlier) == 2  # made to differ at 8; then the first one goes on alike
    assert drafts.repeated(3, [1, 2, 8, 7], earlier) == 0
    assert drafts.repeated(1, [5, 2, 3, 4, 6], earlier) == 4  # whatever came first
    assert drafts.repeated(3, [4, 4, 4, 4], earlier) == 0


def test_drafts_bounds_what_could_be_saved(run: Run) -> None:
    last = run(drafts, "--samples", "16", "--requests", "1", "--rows", "4", "--tokens", "12", "--rounds", "2")
    for share in last["shares"]:
        assert 0 <= share["repeated"] <= share["new"] > 0
        assert share["saved_at_most"] <= share["share"] == share["repeated"] / share["new"]


def test_the_pictures_in_the_docs_are_of_the_newest_results() -> None:
    assert {path.name: path.read_text("utf-8") for path in plots.FOLDER.glob("*.svg")} == plots.draw()


def test_a_picture_is_xml_that_names_its_lines() -> None:
    text = plots.picture("a < b", "x", "y", {"one & two": [(1, 1.0), (2, 3.0)], "three": [(1, 2.0), (2, 2.5)]})
    root = ElementTree.fromstring(text)
    said = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", "■ one & two", "■ three"} <= set(said)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2


def test_a_benchmark_is_a_module_that_can_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arithmetic, speed, concurrency, drafts, grammar, overlap, scaling, memory, gpu):
        monkeypatch.setattr(sys, "argv", [str(module.__file__), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(module.__file__), run_name="__main__")


def test_tools_counts_calls_and_answers_by_kind_and_tells_every_failure(run: Run) -> None:
    last = run(tools, "--dialogues", "4", "--samples", "8", "--split", "dev")
    assert list(last["counts"]["all"]) == ["unaided_call", "call", "unaided_answer", "answer"]
    counts = {kind: found["call"] for kind, found in last["counts"].items()}
    assert counts.pop("all").endswith(" of 4")
    assert int(counts.pop("with results").split(" of ")[1]) <= 4
    assert sum(int(each.split(" of ")[1]) for each in counts.values()) == 4
    right = sum(int(each.split(" of ")[0]) for each in counts.values())
    assert len(last["failures"]) >= 4 - right
