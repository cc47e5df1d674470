"""Whether an answer tells what the tools returned."""

import json

import pytest

from langchain_aisp.rewards import told_results
from langchain_aisp.types import Chat


def returned(*results: str, before: Chat = ()) -> Chat:
    """A conversation whose tools have just returned these results."""
    asked = {"role": "user", "content": "Where is my order 17?"}
    calling = {"role": "assistant", "content": ""}
    return [*before, asked, *(turn for result in results for turn in (calling, {"role": "tool", "content": result}))]


@pytest.mark.parametrize(
    ("result", "answer", "share"),
    [
        ("It is near Oslo.", "Your order is near Oslo.", 1.0),
        ("It is near Oslo.", "Your order is in Oslo.", 0.5),
        ("It is near Oslo.", "I do not know.", 0.0),
        ("near OSLO", "It is Near oslo!", 1.0),
        ("near Oslo", "It is near Oslofjord.", 0.5),
        ("1,204.50", "You get 1204.5 euros.", 1.0),
        ("1,5", "It is 1,5 metres.", 1.0),
        ("-3", "It is -3 degrees.", 1.0),
        ("-3", "It is 3 degrees.", 0.0),
        ("booked for 14:30", "It is booked for 14:30.", 1.0),
        ("booked for 14:30", "It is booked for 14.", 0.5),
        ("three", "It is three.", 1.0),
        ("3", "There are three left.", 1.0),
        ("東京", "天気は東京です", 1.0),
    ],
)
def test_the_words_and_numbers_of_a_result_are_looked_for(result: str, answer: str, share: float) -> None:
    assert told_results(returned(result), [answer]) == [share]


def test_of_json_the_values_count_and_truth_values_do_not() -> None:
    result = json.dumps({"status": {"code": 4.5, "where": ["Oslo", None]}, "open": True})
    assert told_results(returned(result), ["4.5 at Oslo", "status code where open", "true 4.5"]) == [1.0, 0.0, 0.5]


def test_all_results_since_the_users_last_message_count_and_earlier_ones_do_not() -> None:
    chat = returned("Oslo", "Rome", before=returned("Vienna"))
    assert told_results(chat, ["Oslo and Rome", "Rome", "Vienna"]) == [1.0, 0.5, 0.0]


def test_every_answer_gets_one_where_nothing_was_returned() -> None:
    assert told_results([{"role": "user", "content": "Hello"}], ["Hi", ""]) == [1.0, 1.0]
    assert told_results(returned(""), ["Hi"]) == [1.0]
    assert told_results(returned("Oslo", before=())[:1], ["Hi"]) == [1.0]
