"""Best and worst answers teach a LoRA by DPO: the model answers better by itself, and with AISP on top better still."""

import tempfile
from statistics import mean

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from langchain_aisp import AISP, AISPChatModel, BestOfN
from langchain_aisp.cli import app
from langchain_aisp.demo import LANGUAGE_MODEL_PATH, scenarios

CUSTOMERS = [list(customer.messages) for customer in scenarios("test", 8)]
EXPORT = "export-preferences --method aisp:iterations=3 --samples 12 --max-tokens 72 --limit 24 --pairs 3 --out"
SHORT = {"learning_rate": 2e-3, "num_train_epochs": 2, "per_device_train_batch_size": 8, "max_length": 384}
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}


def ask(method: AISP | BestOfN, adapter: str | None = None) -> tuple[float, float]:
    """Mean reward of plain samples, and of the best answers, to customers that no training saw."""
    chat = AISPChatModel(model="demo", adapter=adapter, method=method, max_tokens=72, seed=1)
    traces = [message.response_metadata["trace"] for message in chat.batch(CUSTOMERS)]
    return mean(trace[0]["mean"] for trace in traces), mean(trace[-1]["best"] for trace in traces)


with tempfile.TemporaryDirectory() as folder:
    app([*EXPORT.split(), f"{folder}/pairs.jsonl"], standalone_mode=False)
    pairs = load_dataset("json", data_files=f"{folder}/pairs.jsonl", split="train", cache_dir=folder)
    config = DPOConfig(f"{folder}/lora", use_cpu=True, bf16=False, gradient_checkpointing=False, **SHORT, **QUIET)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(str(LANGUAGE_MODEL_PATH), args=config, train_dataset=pairs, peft_config=lora)
    trainer.train()
    trainer.save_model()
    (before, _), (after, _) = ask(BestOfN(samples=8)), ask(BestOfN(samples=8), config.output_dir)
    _, searched = ask(AISP(samples=12, iterations=3), config.output_dir)
print(f"mean reward by itself {before:.2f}, after training {after:.2f}, with AISP on top {searched:.2f}")
assert before < after < searched
