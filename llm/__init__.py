"""From one text file to a language model that talks.

Nouns are imported (`from llm.model import Transformer`), verbs are run (`python -m llm.sample`).
"""

__version__ = "0.1.0"
