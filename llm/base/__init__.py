"""Errors, durable files, hashing and constants: the lowest layer, on which all others build."""
