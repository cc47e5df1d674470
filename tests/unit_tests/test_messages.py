"""LangChain messages become conversations that strict chat templates accept, and nothing is lost without a word."""

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)

from langchain_aisp.messages import continues_last, to_chat

CALL = {"name": "add", "args": {"a": 1, "b": 2}, "id": "call-1", "type": "tool_call"}
RENDERED_CALL = {"type": "function", "id": "call-1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def roles(chat):
    return [turn["role"] for turn in chat]


def test_a_plain_conversation_keeps_its_order():
    chat = to_chat([SystemMessage("Be kind."), HumanMessage("Hello"), AIMessage("Hi"), HumanMessage("How are you?")])
    assert chat == (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "How are you?"},
    )


def test_neighbours_of_one_role_become_one_turn():
    messages = [SystemMessage("a"), SystemMessage("b"), HumanMessage("c"), HumanMessage("d"), AIMessage("e")]
    chat = to_chat([*messages, AIMessage("f"), HumanMessage("g")])
    assert [turn["content"] for turn in chat] == ["a\n\nb", "c\n\nd", "e\n\nf", "g"]
    assert roles(chat) == ["system", "user", "assistant", "user"]


def test_a_late_system_message_moves_to_the_front():
    chat = to_chat([SystemMessage("a"), HumanMessage("b"), AIMessage("c"), SystemMessage("d"), HumanMessage("e")])
    assert roles(chat) == ["system", "user", "assistant", "user"]
    assert chat[0]["content"] == "a\n\nd"


def test_two_late_system_messages_become_the_one_at_the_start():
    late = [SystemMessage("b"), AIMessage("c"), HumanMessage("d"), SystemMessage("e")]
    chat = to_chat([HumanMessage("a"), *late])
    assert [(turn["role"], turn["content"]) for turn in chat] == [
        ("system", "b\n\ne"),
        ("user", "a"),
        ("assistant", "c"),
        ("user", "d"),
    ]


def test_users_that_a_late_system_message_separated_are_joined():
    assert roles(to_chat([HumanMessage("a"), SystemMessage("b"), HumanMessage("c")])) == ["system", "user"]


def test_chunks_are_messages():
    assert to_chat([AIMessageChunk("Hi")]) == ({"role": "assistant", "content": "Hi"},)


@pytest.mark.parametrize(
    "content",
    [
        "Hello\nworld",
        ["Hello", "world"],
        [{"type": "text", "text": "Hello"}, {"type": "text", "text": "world", "cache_control": {"type": "ephemeral"}}],
        [{"text": "Hello"}, {"type": "text-plain", "text": "world", "mime_type": "text/plain"}],
    ],
)
def test_text_blocks_of_a_user_stand_on_lines(content):
    assert to_chat([HumanMessage(content)])[0]["content"] == "Hello\nworld"


def test_text_blocks_of_an_answer_follow_each_other():
    answer = AIMessage([{"type": "text", "text": "Hel", "index": 0}, {"type": "text", "text": "lo", "index": 0}])
    assert to_chat([answer])[0]["content"] == "Hello"


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "base64": "aGk=", "mime_type": "image/png"},
        {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}},
        {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}},
        {"type": "file", "base64": "aGk=", "mime_type": "application/pdf"},
        {"type": "tool_result", "tool_use_id": "call-1", "content": "3"},
        {"type": "thinking", "thinking": "hm"},  # a user does not think
        {"type": "text", "text": None},
    ],
)
def test_what_is_no_text_raises_an_error_that_names_it(block):
    with pytest.raises(ValueError, match=rf"type '{block['type']}' .*'human'.*text only") as caught:
        to_chat([HumanMessage([{"type": "text", "text": "Look:"}, block])])
    assert "in words" in str(caught.value)


def test_an_image_from_a_tool_raises_too():
    image = [{"type": "image", "base64": "aGk=", "mime_type": "image/png"}]
    with pytest.raises(ValueError, match=r"'image' .*'tool'"):
        to_chat([HumanMessage("Draw."), AIMessage("", tool_calls=[CALL]), ToolMessage(image, tool_call_id="call-1")])


def test_an_empty_list_raises():
    with pytest.raises(ValueError, match="at least one message"):
        to_chat([])


def test_a_message_of_another_kind_raises():
    with pytest.raises(TypeError, match=r"RemoveMessage cannot be rendered.*HumanMessage"):
        to_chat([RemoveMessage(id="1")])


def test_a_name_is_kept():
    assert to_chat([HumanMessage("Hello", name="ann")]) == ({"role": "user", "content": "Hello", "name": "ann"},)


def test_a_joined_turn_keeps_a_name_only_if_all_have_it():
    ann, bob = HumanMessage("a", name="ann"), HumanMessage("b", name="bob")
    assert to_chat([ann, ann])[0]["name"] == "ann"
    assert "name" not in to_chat([ann, bob])[0]


def test_a_chat_message_keeps_its_role():
    chat = to_chat([ChatMessage("Be kind.", role="critic"), HumanMessage("Hello")])
    assert roles(chat) == ["critic", "user"]


def test_tool_calls_have_their_arguments_as_a_dict():
    assert to_chat([HumanMessage("1 + 2?"), AIMessage("", tool_calls=[CALL])])[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [RENDERED_CALL],
    }


def test_a_tool_use_block_and_its_tool_call_are_one_call():
    block = {"type": "tool_use", "id": "call-1", "name": "add", "input": {"a": 1, "b": 2}}
    text = {"type": "text", "text": "Let me see."}
    both = AIMessage([text, block], tool_calls=[CALL])
    alone = AIMessage([text, block])
    assert to_chat([both]) == to_chat([alone])
    assert to_chat([both])[0] == {"role": "assistant", "content": "Let me see.", "tool_calls": [RENDERED_CALL]}


@pytest.mark.parametrize(
    ("block", "rendered"),
    [
        ({"id": "1", "name": "add", "input": '{"a": 1,'}, {"name": "add", "arguments": {"invalid_json": '{"a": 1,'}}),
        ({"id": "1", "name": "add"}, {"name": "add", "arguments": {"invalid_json": ""}}),
        ({"id": "1", "input": {"a": 1}}, {"name": "", "arguments": {"a": 1}}),
    ],
)
def test_a_tool_use_block_in_pieces_is_a_call_still(block, rendered):
    [turn] = to_chat([AIMessage([{"type": "tool_use", **block}])])
    assert turn["tool_calls"][0]["function"] == rendered


@pytest.mark.parametrize("content", ["", [], [""], [{"type": "text", "text": ""}]])
def test_nothing_beside_a_call_is_an_empty_text(content):
    [turn] = to_chat([AIMessage(content, tool_calls=[CALL])])
    assert turn == {"role": "assistant", "content": "", "tool_calls": [RENDERED_CALL]}


def test_an_invalid_call_stands_behind_the_valid_ones_and_keeps_its_result():
    invalid = {"name": "add", "args": "{", "id": "call-2", "error": "cut off", "type": "invalid_tool_call"}
    answer = AIMessage("", tool_calls=[CALL], invalid_tool_calls=[invalid])
    results = [ToolMessage("3", tool_call_id="call-1"), ToolMessage("no JSON", tool_call_id="call-2", status="error")]
    asked, *answered = to_chat([answer, *results])
    assert [call["id"] for call in asked["tool_calls"]] == ["call-1", "call-2"]
    assert [(turn["content"], turn["name"]) for turn in answered] == [("3", "add"), ("Error: no JSON", "add")]


def test_a_result_whose_call_is_gone_stays_a_result():
    chat = to_chat([HumanMessage("Well?"), ToolMessage("3", tool_call_id="lost")])
    assert chat[1] == {"role": "tool", "content": "3", "tool_call_id": "lost"}


def test_standard_content_blocks_are_read_once():
    answer = AIMessage(
        content_blocks=[{"type": "reasoning", "reasoning": "Sum."}, {"type": "text", "text": "So."}, CALL]
    )
    assert to_chat([answer])[0] == {
        "role": "assistant",
        "content": "So.",
        "reasoning_content": "Sum.",
        "tool_calls": [RENDERED_CALL],
    }


def test_an_invalid_tool_call_still_has_arguments_in_a_dict():
    invalid = {"name": "add", "args": '{"a": 1,', "id": "call-1", "error": None, "type": "invalid_tool_call"}
    [turn] = to_chat([AIMessage("", invalid_tool_calls=[invalid])])
    assert turn["tool_calls"][0]["function"] == {"name": "add", "arguments": {"invalid_json": '{"a": 1,'}}


@pytest.mark.parametrize(
    "answer",
    [
        AIMessage("Hi", additional_kwargs={"reasoning_content": "A greeting."}),
        AIMessage([{"type": "thinking", "thinking": "A greeting.", "signature": "x"}, {"type": "text", "text": "Hi"}]),
    ],
)
def test_reasoning_stands_apart_from_the_text(answer):
    assert to_chat([answer])[0] == {"role": "assistant", "content": "Hi", "reasoning_content": "A greeting."}


def test_results_of_tools_stay_apart_and_learn_their_tool_from_the_call():
    second = {**CALL, "id": "call-2", "name": "multiply"}
    results = [
        ToolMessage("3", tool_call_id="call-1"),
        ToolMessage([{"type": "text", "text": "2"}], tool_call_id="call-2"),
    ]
    chat = to_chat([HumanMessage("Well?"), AIMessage("", tool_calls=[CALL, second]), *results])
    assert chat[2:] == (
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "call-1"},
        {"role": "tool", "content": "2", "name": "multiply", "tool_call_id": "call-2"},
    )


@pytest.mark.parametrize("text", ["Error: no b.", "no b."])
def test_the_error_of_a_tool_says_so_in_words(text):
    result = ToolMessage(text, tool_call_id="call-1", status="error")
    assert to_chat([AIMessage("", tool_calls=[CALL]), result])[1]["content"] == "Error: no b."


def test_the_result_of_a_function_is_the_result_of_a_tool():
    assert to_chat([FunctionMessage("3", name="add")]) == ({"role": "tool", "content": "3", "name": "add"},)


def test_joined_answers_keep_all_their_calls():
    second = {**CALL, "id": "call-2"}
    [turn] = to_chat([AIMessage("a", tool_calls=[CALL]), AIMessage("b", tool_calls=[second])])
    assert turn["content"] == "a\n\nb"
    assert [call["id"] for call in turn["tool_calls"]] == ["call-1", "call-2"]


def test_the_messages_are_not_edited():
    messages = [HumanMessage(["a", "b"]), AIMessage([{"type": "text", "text": "c"}], tool_calls=[CALL])]
    before = [message.model_copy(deep=True) for message in messages]
    to_chat([*messages, *messages])
    assert messages == before


def test_an_answer_at_the_end_is_continued():
    assert continues_last(to_chat([HumanMessage("Name a colour."), AIMessage("It is")]))
    assert not continues_last(to_chat([HumanMessage("Name a colour.")]))


def test_an_empty_answer_at_the_end_is_nothing_to_continue():
    chat = to_chat([HumanMessage("Name a colour."), AIMessage("")])
    assert roles(chat) == ["user"]
    with pytest.raises(ValueError, match="nothing to answer"):
        to_chat([AIMessage("")])


def test_unanswered_tool_calls_cannot_be_continued():
    with pytest.raises(ValueError, match=r"calls the tools \['add'\].*ToolMessage"):
        continues_last(to_chat([HumanMessage("1 + 2?"), AIMessage("", tool_calls=[CALL])]))
