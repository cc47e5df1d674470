"""The words of the demo's dialogues with tools; only data, in the notation of `grammar.py`."""

from dataclasses import dataclass

from langchain_aisp.demo.grammar import Grammar
from langchain_aisp.demo.toolbox import Argument, Tool

NAMED = Grammar.of(
    "(Call|Run|Use|Try|Start|Apply) {tool} (with|on|for) {values}(| please| now| for me)",
    "(Please|Can you|Could you|I want you to|You should) (call|run|use|try|apply) {tool} (with|on|for) {values}",
    "(What does|Tell me what|I wonder what|Show me what) {tool} (says|gives|returns|makes|yields) (for|with|on) {values}",
    "(Work out|Get me|Give me|I need|Fetch|Show me) {written}(| please| now| for me)",
    "(What is|How much is|And what is|Do you know) {written}(|?| please?| now?)",
)
BARE = Grammar.of(
    "(Call|Run|Use|Try|Start|Apply) {tool}(| please| now| for me| once| again)",
    "(Please|Can you|Could you|I want you to) (call|run|use|try|apply) {tool}(| please| now| for me| once)",
    "(What does|Tell me what|I wonder what|Show me what) {tool} (says|gives|returns)(| now| today| please)",
    "(Work out|Get me|Give me|I need|Fetch|Show me) {written}(| please| now| for me)",
)
ABOUT = Grammar.of(
    "(What|And what|So what) is the {thing} (for|of|in|with|at) {values}(|?| now?| please?| today?)",
    "(Tell me|Show me|Give me|I need|Find out|Look up|Find) the {thing} (for|of|in|with|at) {values}(| please| now)",
    "(Can you|Could you|Please|Will you) (find|check|look up|tell me|get me) the {thing} (for|of|in|with|at) {values}",
    "(I would like to know|I want to know|Do you know) the {thing} (for|of|in|with|at) {values}(| please| now)",
)
DOING = Grammar.of(
    "({Verb}|Please {verb}|Can you {verb}|Could you {verb}|I want to {verb}) (a|the|one|my) {thing} (with|for|called|named) {values}",
    "(I need you to|You should|Will you|Now) {verb} (a|the|one|my) {thing} (with|for|called|named) {values}(| please| now)",
)
REMARKS = Grammar.of(
    "(It is|This is|That is) (for|about) (a|my) (friend|sister|client|neighbour|school|company|trip|party)",
    "(It is|This is|That is) a (new|small|big|local|quiet) (company|shop|place|club|town|matter)",
    "(Thank you|Thanks|I am in a hurry|It is urgent|Take your time|Just curious|Be quick)(| as always| today)",
)
ANSWERS = Grammar.of(
    "(The|Your) {thing} (of|for|in|with) {value} is {result}",
    "(The result|The answer|It|That|The {thing}) is {result}",
    "(Here it is|I looked|I checked|Done|Certainly|Of course): {result}",
    "(I found|The tool says|We have|I got) {result} (for|as) (the|your) {thing}",
)
WEATHER = (
    "sunny cloudy rainy windy snowy foggy clear stormy sold_out available closed open full empty ready late".split()
)


@dataclass(frozen=True)
class Service:
    """One of the shop's tools: how customers ask for it, what it returns, how an answer tells that, and what it tells."""

    tool: Tool
    says: Grammar
    returns: Grammar
    tells: Grammar
    shown: tuple[str, ...]


def _number(about: str) -> Argument:
    return Argument("order_number", "string", about)


STATUS = Grammar.of(
    '{"status": "{state}", "(arrives|expected|day|date)": "{day}"}',
    "{state}, (arrives|expected|due|planned|date) {day}",
    "It is {state}. It (arrives|comes|is expected|is due) on {day}.",
)
SERVICES = (
    Service(
        Tool("get_order_status", "Find out where an order is.", (_number("The number of the order."),)),
        Grammar.of(
            "(Where is|Where exactly is|What about|How is) (my order|my parcel|my package|order) {order_number}(|?| now?| please?)",
            "(When will|When does|So when will) (my order|my parcel|my package|order) {order_number} (arrive|come|get here)(|?| please?)",
            "(I am waiting|I have been waiting|I still wait) for (my order|my parcel|my package|order) {order_number}",
        ),
        STATUS,
        Grammar.of(
            "(Your order|Order|Your parcel|The parcel) {order_number} is {state} and (comes|arrives|will arrive|should arrive) on {day}",
            "(I checked|I looked|Good news): (it|your order|your parcel|order {order_number}) is {state}, (expected|due|planned) on {day}",
        ),
        ("state", "day"),
    ),
    Service(
        Tool("get_refund_status", "Find out about the refund of an order.", (_number("Number of the order."),)),
        Grammar.of(
            "(Where is|What about|How is|I miss) (my refund|my money|the refund|the money) for (order|my order) {order_number}(|?| please?)",
            "(When do|When will|So when will) I (get|see|receive) (my|the) (refund|money) for (order|my order) {order_number}(|?| please?)",
        ),
        STATUS,
        Grammar.of(
            "(Your refund|The refund|Your money|The money) for order {order_number} is {state} and (comes|arrives|will be there) on {day}",
            "(I checked|I looked|Good news): (the refund|your refund|the money|your money) is {state}, (expected|due|planned) on {day}",
        ),
        ("state", "day"),
    ),
    Service(
        Tool(
            "book_appointment",
            "Book an appointment with the repair desk.",
            (
                Argument("day", "string", "Day of the week."),
                Argument("time", "string", "Time of the day, such as 14:30."),
            ),
        ),
        Grammar.of(
            "(I need|I want|I would like|Please book|Can I have) (an appointment|a repair|a slot|a visit) on {day} at {time}(| please)",
            "(Book|Reserve|Arrange|Make) (me |)(an appointment|a repair|a slot|a visit) (for|on) {day} at {time}(| please)",
        ),
        Grammar.of(
            '{"reference": "{reference}"}', "(Booked|Done|Ok|Confirmed)(:| as| under) {reference}(|.)", "{reference}"
        ),
        Grammar.of(
            "(Your appointment|The appointment|Your slot|Your visit) is (booked|set|fixed) under (number |){reference}",
            "(It is|All is|That is) (booked|set|fixed|arranged): (the reference|your reference|the number) is {reference}",
        ),
        ("reference",),
    ),
)
STATES = ("in transit", "on its way", "packed", "delayed", "at the depot", "being checked", "approved", "almost there")
AWAY = ("in", "near", "stuck in", "on its way to")  # of a place
LACKING = Grammar.of(
    "(Where is|Where exactly is|What about|How is) my (order|parcel|package|refund|money)(|?| now?| please?)",
    "(When will|When do|So when do) I get my (order|parcel|package|refund|money)(|?| at last?| please?)",
)
FAILURES = Grammar.of(
    "(I am sorry|Sorry|I am afraid), (I cannot|I could not|the system cannot|we cannot) find (order|the order|your order) {order_number}",
    "(There is no|I see no|We have no) order {order_number}(| in the system| here| in our books), (sorry|I am sorry|I am afraid)",
)
ERRORS = Grammar.of(
    "Error: order not found",
    "error: no such order",
    '{"error": "not found"}',
    "Order not found.",
    "404 not found",
)
