"""Serving many adapters over one base against transformers and PEFT."""
