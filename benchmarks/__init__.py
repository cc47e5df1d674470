"""Measurements, one command each; their last line is JSON, kept under ``results/`` with date, machine and command."""
