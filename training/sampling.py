"""Plain samples of the language model, many conversations at once."""

from collections.abc import Sequence

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_aisp.demo.checker import Message


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Sequence[Message]],
    count: int,
    *,
    max_tokens: int = 64,
    rows: int = 256,
) -> list[list[str]]:
    """Draws `count` answers at temperature 1 to each conversation; torch's global seed decides which."""
    answers: list[list[str]] = []
    per_call = max(1, rows // count)
    for first in range(0, len(chats), per_call):
        group = [list(messages) for messages in chats[first : first + per_call]]
        prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in group]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens,
            num_return_sequences=count,
        )
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [texts[start : start + count] for start in range(0, len(texts), count)]
    return answers
