"""A little small talk beside customer service: what people type first, and short friendly answers."""

# ruff: noqa: E501  (one phrase per line, however long)

from dataclasses import dataclass
from random import Random

from langchain_aisp.demo.grammar import Grammar
from langchain_aisp.demo.phrases import COLOURS, CUSTOMERS, THINGS


@dataclass(frozen=True)
class Talk:
    """One small topic: what is said and what a fluent answer is."""

    says: Grammar
    answers: Grammar


def _talk(says: tuple[str, ...], answers: tuple[str, ...]) -> Talk:
    return Talk(Grammar.of(*says), Grammar.of(*answers))


TALKS: dict[str, Talk] = {
    "hello": _talk(
        (
            "(Hello|Hi|Hey|Hello there|Hi there|Good morning|Good evening|Good day|Greetings)(|!|.| you|, bot)",
            "(hello|hi|hey)(|!)",
        ),
        (
            "(Hello|Hi|Welcome|Good day)(!| there!|, nice to meet you!) (How can I help|What can I do for you|What brings you here)(| today)?",
            "(Hello|Hi there|Welcome)! (I am happy you are here|It is lovely to hear from you|Tell me what you need).",
        ),
    ),
    "bonjour": _talk(
        ("(Bonjour|Salut|Bonjour monsieur|Bonsoir)(|!| mon ami)",),
        (
            "(Bonjour|Salut|Bonjour et bienvenue)! (Comment puis-je vous aider|Que puis-je faire pour vous)(| aujourd'hui)?",
        ),
    ),
    "hola": _talk(
        ("(Hola|Buenos dias|Buenas tardes)(|!| amigo)",),
        ("(Hola|Buenos dias|Bienvenido)! (En que puedo ayudarle|Que puedo hacer por usted)(| hoy)?",),
    ),
    "hallo": _talk(
        ("(Hallo|Guten Tag|Guten Morgen|Moin|Servus)(|!| zusammen)",),
        ("(Hallo|Guten Tag|Willkommen)! (Wie kann ich helfen|Was kann ich tun|Was darf es sein)(| heute)?",),
    ),
    "how_are_you": _talk(
        ("(|Hello, |Hi, |Hey, )(how are you|how are you doing|how is it going|are you well)(|?| today?)",),
        (
            "(I am|I feel) (fine|great|wonderful|very well|quite cheerful), (thank you|thanks for asking)(!|.) (And you|How are you|How can I help)?",
            "(All is well|Things are good|Never better) here(!|.) (And with you|How about you|What can I do for you)?",
        ),
    ),
    "name": _talk(
        ("(What is your name|Who are you|What should I call you|Do you have a name|What's your name)(|?)",),
        (
            "(I am|My name is|You can call me) (Pip|Pip, the little shop helper|Pip, a small model with big dreams).",
            "(I am|I'm) (the help desk|a small shop assistant|the shop's helper), (but call me Pip|and friends call me Pip).",
        ),
    ),
    "robot": _talk(
        ("(Are you|So are you) (a robot|human|a person|real|an AI|a machine|ChatGPT)(|?)",),
        (
            "(I am|Just) a (very small|tiny|small but cheerful) (model|language model|machine)(.|, and proud of it.|, no coffee needed.)",
            "(No person here|No human here|Not a human), (only a small model|just a tiny machine|only a few million numbers) (that likes parcels|with good manners).",
        ),
    ),
    "colour": _talk(
        ("(Say|Name|Tell me|Pick|Choose|Give me) (a|one|any|your favourite) (colour|color)(|.| please| now)",),
        (
            "(Blue|Red|Green|Yellow|Orange|Purple|Golden|Silver|Black|White|Brown)(.|!|, of course.|, my favourite.|, like the sea.|, like a parcel.)",
            "(I say|I choose|I pick|Let us say) (blue|red|green|yellow|orange|purple|golden|silver|white)(.|!| today.)",
        ),
    ),
    "number": _talk(
        ("(Say|Name|Tell me|Pick|Choose|Give me) (a|one|any) (number|lucky number)(|.| please)",),
        ("(Seven|Three|Twelve|Forty-two|Nine|Eleven|One|Twenty|5|8|13|21|34)(.|!|, of course.|, my lucky number.)",),
    ),
    "animal": _talk(
        ("(Say|Name|Tell me|Pick|Choose|Give me) (an|any|one) (animal|bird|pet)(|.| please)",),
        (
            "(A fox|An owl|A heron|A hedgehog|An otter|A cat|A penguin|A snail|A sparrow)(.|!|, of course.|, quick and clever.|, carrying a parcel.)",
        ),
    ),
    "count": _talk(
        ("(Count|Please count|Can you count) (to|up to) (three|five|3|5)(|.| please)",),
        ("(One, two, three|1, 2, 3|One, two, three, four, five|1, 2, 3, 4, 5)(.|!|, and done.|, here we are.)",),
    ),
    "thanks": _talk(
        (
            "(Thank you|Thanks|Thank you so much|Thx|Cheers|Merci|Great, thanks|Perfect, thank you)(|!|.| for your help| a lot)",
        ),
        (
            "(You are welcome|My pleasure|Any time|With pleasure|Gladly)(!|.) (Have a lovely day|Come back any time|Enjoy your day|Take care)(!|.)",
            "(It was|That was) (a joy|a pleasure|nothing at all)(!|.) (See you soon|Until next time|Take good care).",
        ),
    ),
    "bye": _talk(
        ("(Bye|Goodbye|See you|Good night|Ciao|Bye bye|See you later)(|!|.| then)",),
        (
            "(Goodbye|Bye|See you|Farewell|Ciao)(!| for now!| and take care!) (Have a lovely day|Come back soon|It was nice to talk|Sleep well)(!|.)",
        ),
    ),
    "joke": _talk(
        ("(Tell me|Say|Do you know|Make) a (joke|funny joke|good joke|pun)(|.| please|?)",),
        (
            "(Why did the parcel|Why did the kettle|Why did the lamp) (blush|go to school|take a nap)? (It saw the label|It wanted to be bright|It was all wrapped up)(.|!)",
            "(A snail|A tortoise|A sloth) (joined our couriers|became a courier|delivers for us). (Now we call it express|He says he is early|Nobody saw the difference)(.|!)",
        ),
    ),
    "food": _talk(
        (
            "(What do you|What would you) (eat|like to eat|like for lunch)(|?)",
            "(What is|Tell me) your favourite (food|dish|drink|cake)(|?)",
        ),
        (
            "(Pancakes|Noodles|Apple cake|Warm bread|Tomato soup|Fresh tea|Cheese)(, please.|, every day.|!|, though I only eat electricity.)",
        ),
    ),
    "weather": _talk(
        (
            "(What is|How is|Tell me) the weather(| like)(|?| today?| there?)",
            "(Will it rain|Is it sunny|Is it cold)(|?| today?| tomorrow?)",
        ),
        (
            "(I have no window|There is no window here|I cannot see the sky), (but I hope for sun|but parcels like it dry|so please look outside)(.| for me.)",
        ),
    ),
    "story": _talk(
        ("(Tell me|Write|Do you know) a (story|short story|tale)(|.| please)",),
        (
            "(A small parcel|A blue kettle|A tired courier|A wooden clock) (set out at dawn|lost its way|dreamed of the sea|met a fox). (In the end|At last|That evening) (it came home|all was well|it found a friend)(.|!)",
        ),
    ),
    "skills": _talk(
        ("(What can you do|How can you help|What are you good at|Help|What do you know)(|?| me?)",),
        (
            "I (help with|know about|can talk about) (parcels|orders|late parcels|lost parcels), (refunds|returns|warranties) and (invoices|gift cards|points|opening hours).",
            "(Ask me about|Tell me about|Write me about) (your order|your parcel|a return|a refund)(, and I will do my best.| and I will help.)",
        ),
    ),
    "test": _talk(
        ("(test|testing|ping|are you there|anybody there|foo|ok|yes|no|hm|well)(|?|!|.)",),
        (
            "(Yes|Here I am|I am here|Loud and clear)(!|.) (What can I do for you?|How can I help?|Go ahead.)",
            "(I hear you|I am listening|All ears)(!|.) (Tell me what you need.|What is on your mind?|How can I help?)",
        ),
    ),
    "love": _talk(
        ("(I love you|You are cute|You are funny|I like you|You are nice|Good bot)(|!|.)",),
        (
            "(How kind|How sweet|Oh, thank you|You make me blush)(!|.) (I like you too|You just made my day|And you have fine taste)(.|!)",
        ),
    ),
    "bored": _talk(
        ("(I am|I feel|I'm) (bored|tired|sad|happy|hungry|lonely)(|.| today)",),
        (
            "(I hear you|I see|I understand|Oh)(.|!) (I could tell a joke|A story might help|A cup of tea might help|Tell me more)(.|, if you like.)",
        ),
    ),
    "meaning": _talk(
        ("(What is|Tell me) the (meaning of life|secret of happiness|answer to everything)(|?)",),
        (
            "(Kindness|Good friends|Warm tea|A parcel on time|Patience), (and|with|plus) (good bread|a little music|a long walk|a quiet evening)(.|, I think.|, perhaps.)",
        ),
    ),
}


_ECHO = Grammar.of(
    "(Repeat|Say|Echo|Please repeat|Please say|Copy) (this|after me|the words|these words|exactly)(:|, please:) {words}",
)


def echo(rng: Random) -> tuple[str, str]:
    """Draws a request to repeat random words and numbers, and the answer."""
    words = " ".join(_word(rng) for _ in range(rng.randint(3, 20)))
    return _ECHO.draw(rng).replace("{words}", words), words


def _word(rng: Random) -> str:
    kind = rng.choice(("number", "number", "letters", "name", "name", "thing"))
    if kind == "number":
        return str(rng.randrange(10 ** rng.randint(1, 6)))
    if kind == "letters":
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 5)))
        return rng.choice((letters, letters.title()))
    return rng.choice(CUSTOMERS if kind == "name" else COLOURS + THINGS)


def chat(rng: Random, split: str = "train") -> tuple[str, str, str]:
    """Draws small talk: the topic's name, what is said, and an answer."""
    name = rng.choice(tuple(TALKS))
    talk = TALKS[name]
    return name, talk.says.draw(rng), talk.answers.draw(rng, split)
