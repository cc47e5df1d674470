"""The tools of the demo's dialogues: made-up functions with typed arguments, and values for these.

Deterministic and without torch. A tool is drawn, never listed: its name joins a verb, a thing and now and then a word
that nobody knows, so a model can only call it by copying it from the prompt.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from langchain_aisp.demo.grammar import values_of

VERBS = tuple(
    """get find check fetch show read list create book cancel send set update search compute convert count open start
    track lookup add remove make plan pay print call order reserve change ask""".split()
)
OBJECTS = tuple(
    """weather price stock balance schedule invoice route score ticket menu forecast traffic distance rating status
    address appointment reminder account customer delivery refund room table flight train hotel lesson recipe song film
    book note event meeting report payment parcel contract level volume speed temperature humidity number total tax
    exchange rate population capital time zone length weight""".split()
)
QUALITIES = tuple("current daily next last local new old full short long main open quick secret special".split())
PLACES = tuple(
    """Lisbon Oslo Vienna Prague Madrid Rome Athens Dublin Warsaw Zurich Geneva Porto Turin Milan Lyon Nice Basel Bern
    Graz Linz Bonn Kiel Gent Delft Leeds York Bath Derby Cork Galway Bergen Malmo Turku Tampere Riga Vilnius Tallinn
    Split Zadar Bled Brno Gdansk Krakow Lviv Odesa Varna Sofia Izmir Ankara Cairo Tunis Rabat Dakar Accra Lagos Nairobi
    Durban Lima Quito Bogota Cusco Salta Recife Havana Austin Boston Denver Dallas Seattle Tulsa Omaha Tampa Reno
    Toronto Quebec Halifax Perth Hobart Darwin Osaka Kyoto Kobe Seoul Busan Hanoi Delhi Pune Dhaka Colombo""".split()
)
_FIRST = "New Port Saint East West North South Fort Lake Mount Santa Bad".split()
REGIONS = "AT CH DE ES FR IT NO PT SE UK NY TX WA OR MA FL NSW BC".split()
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
TYPES = ("string", "string", "string", "integer", "number", "boolean")
ARGUMENTS = tuple(
    """location city place name customer_name order_number order_id date day time amount quantity count email phone
    query text message title value number input unit currency language color size code id item product price level
    start end from_city to_city first second temperature distance weight key word topic reason note priority""".split()
)
_ABOUT = ("The {}.", "A {}.", "{} to use.", "The {} in question.", "Which {}.", "The {} of the request.")
_DOES = (
    "{verb} the {thing}.",
    "{verb} the {thing} of a {key}.",
    "{verb} a {thing} by {key}.",
    "{verb} the {thing} for a {key}",
)
_SYLLABLES = (
    "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wi xo yu za bri cla dro fle gri plu sto tri ska".split()
)
_SCRIPTS = (
    "äöüßéèñçåøłžšđ",
    "абвгдежзиклмнопрстуя",
    "αβγδεζηθικλμνξοπρστω",
    "漢字東京山川水火木金土日月人大小中",
    "アイウエオカキクケコサシスセソタチツ",
    "가나다라마바사아자차카타파하",
)


@dataclass(frozen=True)
class Argument:
    """One argument of a tool: its name, JSON type, and how it is described."""

    name: str
    type: str
    about: str
    required: bool = True


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call."""

    name: str
    about: str
    arguments: tuple[Argument, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in the form of the OpenAI API."""
        properties = {each.name: {"type": each.type, "description": each.about} for each in self.arguments}
        required = [each.name for each in self.arguments if each.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.about, "parameters": parameters},
        }


def made_up(rng: Random) -> str:
    """A word that nobody knows."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))


def foreign(rng: Random) -> str:
    """A few letters of another script, now and then of two."""
    scripts = rng.sample(_SCRIPTS, rng.choice((1, 1, 1, 2)))
    return "".join(rng.choice(rng.choice(scripts)) for _ in range(rng.randint(2, 9)))


def place(split: str, rng: Random) -> str:
    """A town, sometimes of two words, sometimes with its region."""
    town = rng.choice(values_of(split, PLACES))
    town = f"{rng.choice(_FIRST)} {town}" if rng.random() < 0.4 else town
    return f"{town}, {rng.choice(REGIONS)}" if rng.random() < 0.35 else town


def tool(rng: Random) -> Tool:
    """A made-up tool with up to three arguments."""
    keys = rng.sample(ARGUMENTS, rng.choices((0, 1, 2, 3), (1, 6, 3, 1))[0])
    arguments = tuple(_argument(key, index, rng) for index, key in enumerate(keys))
    verb, thing = rng.choice(VERBS), rng.choice(OBJECTS)
    words = rng.choice(((verb, thing), (verb, thing), (verb, rng.choice(QUALITIES), thing), (made_up(rng), thing)))
    about = rng.choice(_DOES).format(verb=verb.capitalize(), thing=thing, key=keys[0] if keys else "day")
    return Tool("_".join(words), about.replace("_", " "), arguments)


def _argument(key: str, index: int, rng: Random) -> Argument:
    about = rng.choice(_ABOUT).format(key.replace("_", " "))
    return Argument(key, rng.choice(TYPES), about, required=index == 0 or rng.random() < 0.7)
