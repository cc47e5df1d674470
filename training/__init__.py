"""Builds the demo models: tokenizer, language model and reward model, from generated dialogues only."""
