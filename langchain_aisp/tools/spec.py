"""What a tool is to a model: a name, a description, a JSON schema of its arguments."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_aisp.types import require

_FORM = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'


@dataclass(frozen=True)
class ToolSpec:
    """One tool.

    Attributes:
        name: What the model calls it by.
        description: What it is for.
        schema: JSON schema of its arguments, as JSON text: so a spec can be hashed, pickled and compared. The order
            of the properties is kept, since grammars write them in that order.
    """

    name: str
    description: str
    schema: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The JSON schema of the arguments."""
        parameters: dict[str, Any] = json.loads(self.schema)
        return parameters

    @classmethod
    def from_openai(cls, tool: Mapping[str, Any]) -> ToolSpec:
        """Read a tool in the form of the OpenAI API.

        Raises:
            ValueError: It has another form, no name, or a schema that does not describe an object.
        """
        function = tool.get("function")
        require(
            tool.get("type") == "function" and isinstance(function, Mapping),
            f"A tool must have the form {_FORM}, got {dict(tool)!r}",
        )
        assert isinstance(function, Mapping)
        name = function.get("name") or ""
        require(isinstance(name, str) and name != "", f"A tool needs a name, got {name!r} in {dict(function)!r}")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        require(
            isinstance(parameters, Mapping) and parameters.get("type") == "object",
            f'The parameters of the tool {name!r} must be a JSON schema of "type": "object", got {parameters!r}',
        )
        return cls(name, function.get("description") or "", json.dumps(parameters, ensure_ascii=False))

    def to_openai(self) -> dict[str, Any]:
        """The tool in the form of the OpenAI API, which chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def tool_specs(tools: Sequence[Mapping[str, Any]]) -> tuple[ToolSpec, ...]:
    """Read tools in the form of the OpenAI API.

    Raises:
        ValueError: As in ``ToolSpec.from_openai``, or two tools share a name.
    """
    specs = tuple(map(ToolSpec.from_openai, tools))
    shared = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    require(not shared, f"Several tools are named {shared}; a call could mean either of them. Rename all but one")
    return specs
