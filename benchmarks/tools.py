"""How well the demo calls tools: dialogues of the test split, whose tools and phrasings training has never seen.

Why: valid calls come from the grammar, right ones from the model and from the search. A call is right when name and
arguments are exactly those expected; a request that needs no call is right when none is made. A final answer is right
when it says what the tools returned and calls nothing. Both are searched twice: unaided, with the demo's reward model
alone, which leaves calls to the language model; and with rewards that say what matters, that a call passes on what the
customer spelled out and that an answer tells what the tools returned. The conversation up to the tools' results is
given, so that calls and answers are counted apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, convert_to_messages

from benchmarks.common import save
from langchain_aisp import AISP, AISPChatModel
from langchain_aisp.demo import REWARD_MODEL_PATH
from langchain_aisp.demo.tool_dialogues import KINDS, ToolDialogue, tool_dialogues
from langchain_aisp.rewards import ClassifierReward, CoveringCalls, WeightedSum, told_results

CALLERS = 4
COUNTED = ("unaided_call", "call", "unaided_answer", "answer")


def main() -> None:
    """Run all dialogues, print the counts and save them."""
    options = _options()
    judge = ClassifierReward.from_pretrained(REWARD_MODEL_PATH)
    aided = CoveringCalls(text=WeightedSum([(judge, 1.0), (told_results, options.telling)]))
    settings = {"max_tokens": 96, "temperature": options.temperature, "seed": options.seed}
    chats = [
        AISPChatModel(model="demo", reward=reward, method=AISP(samples=options.samples), **settings)
        for reward in (judge, aided)
    ]
    made = tool_dialogues(options.split, options.dialogues, seed=options.seed)
    with ThreadPoolExecutor(CALLERS) as callers:
        outcomes = list(callers.map(lambda each: outcome(*chats, each), made))
    table = {"all": outcomes, "with results": [each for each in outcomes if each["results"]]}
    table |= {kind: [each for each in outcomes if each["kind"] == kind] for kind in KINDS}
    counts = {kind: {what: rate(found, what) for what in COUNTED} for kind, found in table.items()}
    failures = [each for each in outcomes if not all(each[what] for what in COUNTED)]
    for kind, each in counts.items():
        print(f"{kind:12} " + "  ".join(f"{what.replace('_', ' ')} {found}" for what, found in each.items()))
    save("tools", {**vars(options), "counts": counts, "failures": failures})


def outcome(unaided: AISPChatModel, aided: AISPChatModel, made: ToolDialogue) -> dict[str, Any]:
    """What the model did in one dialogue, unaided and aided, and whether it was right."""
    expected = [(call.name, dict(call.arguments)) for call in made.calls]
    found: dict[str, Any] = {"kind": made.kind, "asked": made.messages[-1]["content"], "expected": expected}
    found["results"] = made.results
    for prefix, chat in (("unaided_", unaided), ("", aided)):
        bound = chat.bind_tools(made.schemas)
        called = bound.invoke(messages(made.messages))
        final = bound.invoke(messages(made.answered)) if made.calls else called
        calls = [(call["name"], call["args"]) for call in called.tool_calls]
        found |= {f"{prefix}calls": calls, f"{prefix}call": calls == expected}
        right = made.uses_results(final.text) and not final.tool_calls
        found |= {f"{prefix}final": final.text, f"{prefix}answer": right}
    return found


def messages(turns: Sequence[Any]) -> list[BaseMessage]:
    """Turns of a dialogue as LangChain's messages; each result answers the next call."""
    found: list[BaseMessage] = []
    made, answered = count(), count()
    for turn in turns:
        if turn.get("tool_calls"):
            functions = [call["function"] for call in turn["tool_calls"]]
            calls = [{"name": f["name"], "args": f["arguments"], "id": f"call_{next(made)}"} for f in functions]
            found.append(AIMessage("", tool_calls=calls))
        elif turn["role"] == "tool":
            found += convert_to_messages([{**turn, "tool_call_id": f"call_{next(answered)}"}])
        else:
            found += convert_to_messages([turn])
    return found


def rate(found: Sequence[dict[str, Any]], name: str) -> str:
    """How many were right, of how many."""
    return f"{sum(each[name] for each in found)} of {len(found)}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dialogues", type=int, default=150)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.3, help="chosen on dev dialogues")
    parser.add_argument("--telling", type=float, default=5.0, help="weight of told_results beside the reward model")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=6, help="of dialogues and search; 1 to 5 have been looked at")
    return parser.parse_args()


if __name__ == "__main__":
    main()
