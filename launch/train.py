"""Train one recipe: `python launch/train.py RECIPE`, or the same script under `accelerate launch` or torchrun."""

import sys

try:
    from llm.base.errors import run
    from llm.cli import train
except ImportError as missing:
    print(
        f"error: {missing}. Another package is called `llm` too: in a fresh environment run `pip install -e .`",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    run(train)
