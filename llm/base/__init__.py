"""Errors, durable files, hashing and constants: what every room stands on."""
