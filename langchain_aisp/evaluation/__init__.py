"""Evaluation: methods × prompts × seeds, logged run by run, and reports with intervals and held-out rewards."""
