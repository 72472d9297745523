"""Tokenizer transplantation: give a pretrained model another tokenizer, by any of the known methods."""
