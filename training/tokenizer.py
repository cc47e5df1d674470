"""Trains the tokenizer on the train split: byte-level BPE, digits one by one, roles as special tokens."""

import json
from collections.abc import Iterator
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from langchain_aisp.demo.chitchat import chat
from langchain_aisp.demo.scenarios import compose, scenarios
from langchain_aisp.demo.toolbox import DAYS, made_up, place, tool

VOCABULARY = 3072
CONTEXT = 1024
END, PAD = "<|end|>", "<|pad|>"
ROLES = tuple(f"<|{role}|>" for role in ("system", "user", "assistant", "tool"))
SPECIALS = (
    PAD,
    END,
    *ROLES,
    "<|tools|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    *(f"<|reserved_{index}|>" for index in range(7)),
)

_TURNS = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- elif message['content'] -%}
{%- for part in message['content'] -%}{%- if part['text'] is defined -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{{- '<|tool_call|>' + ((call['function'] if call['function'] is defined else call) | tojson) + '<|/tool_call|>' -}}
{%- endfor -%}
@END@
{%- endfor -%}
"""
_TOOLS = """\
{%- if tools -%}
{{- '<|tools|>' -}}
{%- for tool in tools -%}
{%- set function = tool['function'] -%}
{%- set parameters = function['parameters'] or {} -%}
{{- ('\\n' if not loop.first else '') + function['name'] + '(' -}}
{%- for name, schema in (parameters['properties'] or {}).items() -%}
{{- (', ' if not loop.first else '') + name + ('' if name in (parameters['required'] or []) else '?') -}}
{{- ': ' + (schema['type'] if schema['type'] is string else 'any') -}}
{%- endfor -%}
{{- '): ' + (function['description'] or '').split('\\n')[0] -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
"""
CHAT_TEMPLATE = (
    _TOOLS
    + _TURNS.replace("@END@", "{{- '<|end|>' -}}")
    + ("{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}")
)
REWARD_TEMPLATE = _TURNS.replace("@END@", "{%- if not loop.last -%}{{- '<|end|>' -}}{%- endif -%}")  # ends as it ends


def texts(count: int, seed: int) -> Iterator[str]:
    """Generates what the tokenizer is trained on."""
    rng = Random(f"tokenizer/{seed}")
    for scenario in scenarios("train", count, seed):
        yield from (message["content"] for message in scenario.messages)
        yield from (compose(scenario, rng)[0] for _ in range(3))
    for _ in range(count // 4):
        yield from chat(rng)[1:]
        yield from _about_a_tool(rng)


def _about_a_tool(rng: Random) -> Iterator[str]:
    """How the template shows a tool, a call, and a result."""
    made = tool(rng)
    values = [place("train", rng), made_up(rng), rng.randrange(1000), rng.choice(DAYS)]
    arguments = {each.name: value for each, value in zip(made.arguments, values, strict=False)}
    yield f"{made.name}({', '.join(f'{each.name}: {each.type}' for each in made.arguments)}): {made.about}"
    yield json.dumps({"name": made.name, "arguments": arguments})
    yield json.dumps({made.name.split("_")[-1]: rng.choice(values)})


def train_tokenizer(seed: int, count: int = 8000) -> PreTrainedTokenizerFast:
    """Trains the tokenizer of the language model."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts(count, seed), trainer)
    return wrap(model, CHAT_TEMPLATE, "left")


def wrap(model: Tokenizer, template: str, padding_side: str) -> PreTrainedTokenizerFast:
    """Gives a trained tokenizer its specials and a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIALS if token not in (PAD, END)],
        model_max_length=CONTEXT,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
