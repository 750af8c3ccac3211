"""Saves and loads adapters in PEFT's file format."""
