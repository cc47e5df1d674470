"""Tool calls and structured answers as pure functions: what may be written (grammars), what was meant (readers).

Families of models differ in data only: see ``formats``. Nothing here knows LangChain, transformers or a model.
"""

from langchain_aisp.tools.formats import FAMILIES, GENERIC, ToolFormat, format_for
from langchain_aisp.tools.grounding import grounded_arguments, grounded_text
from langchain_aisp.tools.lark import check
from langchain_aisp.tools.reading import TextReader, ToolReader
from langchain_aisp.tools.spec import ToolSpec, tool_specs
from langchain_aisp.tools.structured import json_grammar, schema_grammar
from langchain_aisp.tools.thoughts import Thoughts

__all__ = [
    "FAMILIES",
    "GENERIC",
    "TextReader",
    "Thoughts",
    "ToolFormat",
    "ToolReader",
    "ToolSpec",
    "check",
    "format_for",
    "grounded_arguments",
    "grounded_text",
    "json_grammar",
    "schema_grammar",
    "tool_specs",
]
