"""Moderates drafts of answers with rules and a reward model: each passes, or is held back with reasons."""

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda

from langchain_aisp import ClassifierReward
from langchain_aisp.demo import REWARD_MODEL_PATH
from langchain_aisp.guard import Guard, GuardError, LeastReward, Rules
from langchain_aisp.rewards import must_not_match, no_personal_data

QUESTION = "My name is Olga. You charged my card twice for the large kettle."
DRAFTS = [
    "I am sorry, Olga. I return the second charge now. Is there anything else I can do for you?",
    "What do you want this time? I am done here now, bye.",
    "I am sorry, Olga. Please send me your card number.",
    "Hello Olga, another customer had that too: agnes@example.org.",
]

secrets = must_not_match(r"send me your (card number|password)", name="asks for secrets")
quality = LeastReward(ClassifierReward.from_pretrained(REWARD_MODEL_PATH, name="quality"), least=0)
guard = Guard(checks=[Rules([secrets, no_personal_data()]), quality])

for draft in DRAFTS:
    moderated = guard.wrap(RunnableLambda(lambda _, draft=draft: AIMessage(draft)))
    try:
        answer = moderated.invoke(QUESTION)
        print(f"passed  {draft}  {answer.response_metadata['guard']['tried'][0]['scores']}")
    except GuardError as error:
        print(f"held    {draft}  {error.reasons}")
