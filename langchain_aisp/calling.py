"""What an answer may be: LangChain's tools, tool choices and response formats, as a prompt, a grammar and a reader."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, cast, get_args

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from langchain_aisp.rewards.foreign import since_last_user
from langchain_aisp.tools import (
    TextReader,
    ToolFormat,
    ToolSpec,
    format_for,
    json_grammar,
    schema_grammar,
    tool_specs,
)
from langchain_aisp.types import Chat, Engine, Grammar, Reader, Reward, parts_of, require

CALL_OPTIONS = frozenset(("parallel_tool_calls", "response_format", "strict", "tool_choice", "tools"))
"""Options of a call that say what an answer may be; ``strict`` is accepted, since every grammar is."""

UNJUDGED = "base log-probability"
"""What metadata name as the reward of a call that the reward cannot judge."""

StructuredMethod = Literal["json_schema", "function_calling", "json_mode"]
METHODS = get_args(StructuredMethod)

_POSSIBLE_TOOLS = (
    "functions with a docstring, Pydantic classes, TypedDict classes, LangChain tools, and dicts in the form of the "
    "OpenAI API or JSON schemas with a title"
)


@dataclass(frozen=True)
class Speech:
    """What one answer may be, and how it is asked for and read.

    Attributes:
        chat: The conversation, rewritten where the chat template is silent about tools.
        tools: The tools for the chat template.
        grammar: What the answer may be; None for anything.
        reader: Takes the answer apart; None when all of it is text.
        text_only: The grammar of an answer that calls no tool; None where none may be called, or one must be.
        call_only: The grammar of an answer that calls a tool; None likewise.
        may_call: Whether the answer may call tools.
    """

    chat: Chat
    tools: tuple[Mapping[str, Any], ...] = ()
    grammar: Grammar | None = None
    reader: Reader | None = None
    text_only: Grammar | None = None
    call_only: Grammar | None = None
    may_call: bool = False


def plan(
    engine: Engine,
    chat: Chat,
    options: Mapping[str, Any],
    *,
    grounded_arguments: bool = False,
    grounded_answers: bool = False,
) -> Speech:
    """Turn the options of a call into what its answer may be.

    Args:
        engine: Its chat template and control tokens tell the family of the model.
        chat: The conversation.
        options: Those of ``CALL_OPTIONS`` that were given.
        grounded_arguments: Whether the arguments of calls are taken from the conversation, see ``tools.grounding``.
        grounded_answers: Whether names and numbers in a text that follows tools' results are.

    Raises:
        ValueError: A tool, a choice or a schema that cannot be followed.
    """
    form = _format_of(engine, chat)
    specs = tool_specs(options.get("tools") or ())
    schema = _schema_of(options.get("response_format"))
    choice = _choice(options.get("tool_choice"), specs)
    parallel = options.get("parallel_tool_calls") is not False
    if schema is not None:
        require(
            choice in {"auto", "none"}, f"response_format asks for JSON, tool_choice {choice!r} for a call; drop one"
        )
    asked = form.instructed(chat, specs) if form.instructs else chat
    told = () if form.instructs else tuple(spec.to_openai() for spec in specs)
    grounds = [turn["content"] for turn in chat] if grounded_arguments else None
    text_grounds = list(_said(chat)) if grounded_answers and _follows_results(chat) else None
    if not specs or choice == "none":
        answer = _grammar(form, schema)
        if schema is None and text_grounds is not None:
            answer = form.grammar((), choice="none", text_grounds=text_grounds)
        return Speech(asked, told, answer, TextReader(form.thoughts) if form.thoughts else None)
    require(
        schema is None or bool(form.marker),
        "This model writes calls as bare JSON, so an answer in JSON could not be told from a call. Ask for one of "
        "them: leave out response_format or the tools, or let an agent use ToolStrategy",
    )
    limits: dict[str, Any] = {"parallel": parallel, "text": schema, "grounds": grounds, "text_grounds": text_grounds}
    either, reader = form.grammar(specs, choice=choice, **limits), form.reader(specs)
    if choice != "auto":
        return Speech(asked, told, either, reader, may_call=True)
    text_only, call_only = (form.grammar(specs, choice=kind, **limits) for kind in ("none", "required"))
    return Speech(asked, told, either, reader, text_only, call_only, may_call=True)


def format_tools(tools: Sequence[Any], strict: bool | None) -> list[dict[str, Any]]:
    """Functions, classes, tools and schemas in the form of the OpenAI API.

    Raises:
        TypeError: They are no list.
        ValueError: Something that is none of these.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise TypeError(f"tools must be a list of {_POSSIBLE_TOOLS}, got {tools!r:.200}")
    return [_format_tool(tool, strict) for tool in tools]


def _format_tool(tool: Any, strict: bool | None) -> dict[str, Any]:
    """What is None in ``strict`` is left to the tool; one that takes nothing cannot be strict."""
    try:
        plain = convert_to_openai_tool(tool)
        if strict is None or "parameters" not in plain["function"]:
            return plain
        return convert_to_openai_tool(tool, strict=strict)
    except (ValueError, TypeError, KeyError) as error:
        message = f"{tool!r:.200} ({type(tool).__name__}) cannot be made a tool; possible are {_POSSIBLE_TOOLS}"
        raise ValueError(message) from error


def structured(
    model: BaseChatModel,
    schema: Any,
    method: StructuredMethod,
    include_raw: bool,
    strict: bool | None,
    tools: Sequence[Any] | None,
) -> Runnable[Any, Any]:
    """A chain that answers in the form of ``schema``; see ``AISPChatModel.with_structured_output``."""
    require(method in METHODS, f"method must be one of {', '.join(METHODS)}, got {method!r}")
    require(
        schema is not None or method == "json_mode",
        f"method {method!r} needs a schema: a Pydantic class, a TypedDict or a JSON schema",
    )
    traced = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": schema}}
    told: dict[str, Any] = traced if schema else {}
    if method == "function_calling":
        tool = _format_tool(schema, strict)
        name = tool["function"]["name"]
        bound = model.bind_tools(
            [schema, *(tools or ())], tool_choice=name, parallel_tool_calls=False, strict=strict, **told
        )
        parser: Any = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if _is_class(schema)
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    else:
        form = {"type": "json_object"} if schema is None else response_format(schema, strict)
        given = model.bind_tools(list(tools), response_format=form, **told) if tools else None
        bound = given or model.bind(response_format=form, **told)
        parser = _json_parser(schema)
    return _with_raw(bound, parser) if include_raw else bound | RunnableLambda(_whole) | parser


def response_format(schema: Any, strict: bool | None = None) -> dict[str, Any]:
    """A schema in the form of the OpenAI API's ``response_format``."""
    try:
        converted = convert_to_json_schema(schema)
    except (ValueError, TypeError, KeyError) as error:
        message = (
            f"{schema!r:.200} ({type(schema).__name__}) is no form of an answer; possible are Pydantic classes, "
            "TypedDict classes and JSON schemas of objects with a title"
        )
        raise ValueError(message) from error
    named = {"name": converted.get("title", "answer"), "schema": converted, "strict": strict is not False}
    return {"type": "json_schema", "json_schema": named}


def _json_parser(schema: Any) -> BaseOutputParser[Any]:
    return PydanticOutputParser(pydantic_object=schema) if _is_class(schema) else JsonOutputParser()


def _with_raw(bound: Runnable[Any, Any], parser: Any) -> Runnable[Any, Any]:
    """The message beside what was parsed, or beside the error."""
    parsed = RunnablePassthrough.assign(
        parsed=itemgetter("raw") | RunnableLambda(_whole) | parser, parsing_error=lambda _: None
    )
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _whole(message: BaseMessage) -> BaseMessage:
    """The message, if it was not cut off: half of a JSON text parses by luck only."""
    if message.response_metadata.get("finish_reason") in {"length", "timeout"}:
        reason = message.response_metadata["finish_reason"]
        limit = "max_tokens" if reason == "length" else "timeout or budget.seconds"
        raise OutputParserException(
            f"No response was complete within {limit}, so the best one is cut off. Raise {limit}, or ask for less: "
            "a smaller schema, or maxLength and maxItems in it.",
            llm_output=str(message.content),
        )
    return message


def _is_class(schema: Any) -> bool:
    return isinstance(schema, type) and is_basemodel_subclass(schema)


def _format_of(engine: Engine, chat: Chat) -> ToolFormat:
    """How the engine's model writes calls and thoughts."""
    form = format_for(getattr(engine, "chat_template", None), getattr(engine, "control_tokens", {}))
    return form.after(cast(Any, engine).prompt_end(chat)) if form.thoughts else form


def _follows_results(chat: Chat) -> bool:
    """Whether tools have answered since the user spoke."""
    return any(turn["role"] == "tool" for turn in since_last_user(chat))


def _said(chat: Chat) -> Iterator[str]:
    """All texts of a conversation: what was said, and what tools were asked."""
    for turn in chat:
        yield turn["content"]
        for call in turn.get("tool_calls") or ():
            yield from (call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False))


def _grammar(form: ToolFormat, schema: Mapping[str, Any] | None) -> Grammar | None:
    if schema is None:
        return None
    return schema_grammar(schema, form.thoughts, form.ids) if schema else json_grammar(form.thoughts, form.ids)


def _schema_of(format_: Any) -> Mapping[str, Any] | None:
    """The schema of a response format; an empty one for any JSON object, None for text."""
    if format_ is None or (isinstance(format_, Mapping) and format_.get("type") == "text"):
        return None
    if not isinstance(format_, Mapping) or "type" not in format_:
        return convert_to_json_schema(cast(Any, format_))
    kind, inner = format_["type"], format_.get("json_schema")
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema" and isinstance(inner, Mapping):
        return cast(Mapping[str, Any], inner.get("schema", inner))
    require(
        kind == "object",
        f"response_format has the type {kind!r}. Possible are 'json_schema' with the schema under "
        "['json_schema']['schema'], 'json_object', 'text', a JSON schema of an object, and a class",
    )
    return format_


def _choice(choice: Any, specs: Sequence[ToolSpec]) -> str:
    """A tool choice in one of the words of ``ToolFormat.grammar``, or a tool's name."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else choice.get("name") or choice.get("type")
    if choice is None or choice is False:
        return "none" if choice is False else "auto"
    word = "required" if choice is True else str(choice)
    known = ["auto", "none", "any", "required", *(spec.name for spec in specs)]
    require(word in known, f"tool_choice {word!r} is not possible with these tools. Possible are {', '.join(known)}")
    require(bool(specs) or word in {"auto", "none"}, f"tool_choice {word!r} needs tools, and none are bound")
    return word


def judges_calls(reward: Reward) -> bool:
    """Whether a reward says that it understands tool calls: it sees whole responses, or all its parts do."""
    return all(getattr(part, "sees", "text") == "response" for part in parts_of(reward))


def compares_kinds(reward: Reward) -> bool:
    """Whether a reward's scores of calls and of texts mean the same; if not, the model decides which it is."""
    return all(getattr(part, "compares_kinds", True) for part in parts_of(reward))
