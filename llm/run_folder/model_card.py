"""The model card: README.md of a checkpoint, made from the run alone, so that equal runs leave equal bytes.

It has no dates, speeds or paths: it describes the model, not the machine.
"""

from pathlib import Path

from llm.config.schema import Recipe
from llm.data.prompts import example
from llm.data.shards import AnyShards, Split
from llm.data.sources import licence
from llm.data.tokenizer import Tokenizer
from llm.run_folder.record import short_name

FILE_NAME = "README.md"
BARS = 24  # characters of the longest bar
POINTS = 12  # evaluations shown of a longer curve

USE = """```python
from transformers import pipeline

say = pipeline("text-generation", model="THIS FOLDER OR ITS NAME ON THE HUB")
print(say("{prompt}", max_new_tokens=60)[0]["generated_text"])
```
"""

CHAT = """```python
from transformers import pipeline

say = pipeline("text-generation", model="THIS FOLDER OR ITS NAME ON THE HUB")
print(say([{{"role": "user", "content": "{prompt}"}}], max_new_tokens=60)[0]["generated_text"][-1]["content"])
```
"""

OWN_MODEL = """```python
import llm

run = llm.open_run("{run}", model=...)  # the callable that it was trained with
```
"""

Curve = list[list[float]]  # of each evaluation: step, bits per byte


def model_card(
    recipe: Recipe,
    tokenizer: Tokenizer,
    shards: AnyShards,
    step: int,
    curve: Curve,
    parameters: int,
    parts: dict[str, str],
    epochs: float | None = None,
) -> bytes:
    """README.md of the checkpoint after `step`; `parameters` is their number, `recipe` has its length.

    `parts` names those that were a caller's own; `epochs` are given where they are not counted in tokens of the text.
    """
    shape, train, read = recipe.model, recipe.train, step * recipe.train.tokens_per_step
    texts = "\n".join(f"| text | {_plain(short_name(each))}: {licence(each)} |" for each in recipe.text.names)
    began = f", starting from `{_plain(Path(recipe.model.from_).name)}`," if recipe.model.from_ else ""
    family = "Qwen3's" if not recipe.model.from_ else "as it came"
    only = "" if recipe.model.from_ else " and on nothing else"
    if train.teachers:
        only = f" and on the probabilities of {', '.join(f'`{_plain(each)}`' for each in train.teachers)}"
    validated = next((f"{bits:.4f}" for at, bits in curve if at == step), "not evaluated at this step")
    epochs = read / shards.train.tokens if epochs is None else epochs
    does, limits = (_CHATS, _ANSWERS) if shards.is_chat else (_CONTINUES, _GOES_ON)
    if "model" in parts:
        family = f"of its own ({_plain(parts['model'])}), in the sizes"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [causal-lm, "{recipe.run}"]
---

# {recipe.run}

A language model that {does}, trained{began} on the text below{only}.

| | |
|---|---|
{texts}
| training side | {_side(shards.train)} |
| held out | {_side(shards.validation)} |
| tokenizer | {tokenizer.vocab_size:,} pieces, fingerprint `{tokenizer.fingerprint[:12]}` |
| parameters | {parameters:,} |
| architecture | {family}: {shape.layers} layers of {shape.dim}, {shape.heads} heads of {shape.head_dim} over \
{shape.kv_heads} of keys and values, MLP {shape.ffn_dim}, {"tied" if shape.tied else "untied"} embeddings |
| context | {shape.context:,} tokens |
| training | step {step:,} of {train.steps:,}, {read:,} tokens, {epochs:.2f} epochs, \
{_plain(parts.get("optimizer", train.optimizer))}, rate {train.learning_rate:g}, \
decay {train.weight_decay:g}, dropout {shape.dropout:g}, seed {recipe.seed} |
| validation | {validated} bits per byte |

## Curve
{_chart(curve)}
## Use

{_use(recipe, tokenizer, shards, parts)}
## Limits

{limits} Its text may be
false, and may repeat the training text word for word. It reads {shape.context:,} tokens at once. Bias in the text was
not reduced. The licence of the text applies when you pass the model on.
""".encode()


def _use(recipe: Recipe, tokenizer: Tokenizer, shards: AnyShards, parts: dict[str, str]) -> str:
    """How to open the checkpoint."""
    if "model" in parts:
        return OWN_MODEL.format(run=recipe.run)
    if not tokenizer.is_portable:
        return _NO_TOKENIZER
    return (CHAT if shards.is_chat else USE).format(prompt=_plain(example(recipe, tokenizer, shards)))


_CONTINUES, _CHATS = "continues a text", "answers in a conversation"
_GOES_ON = "It continues texts of the kind it was trained on; it answers no questions and follows no instructions."
_ANSWERS = "It answers as the conversations that it was trained on do, and follows no instructions beyond them."
_NO_TOKENIZER = """The vocabulary has no tokenizer.json: `AutoModelForCausalLM` opens the model, sentencepiece reads the
tokenizer.model that the run keeps.
"""


def thinned(curve: Curve) -> Curve:
    """Every second evaluation of a long curve, and the last, so that the curve of a long run stays short."""
    return curve if len(curve) < 64 else [*curve[:-1:2], curve[-1]]


def _chart(curve: Curve) -> str:
    if not curve:
        return "\nNot evaluated.\n"
    last = len(curve) - 1
    chosen = [curve[at] for at in sorted({round(last * n / (POINTS - 1)) for n in range(POINTS)})]
    most = max(bits for _, bits in chosen) or 1.0
    rows = (f"{at:>9,.0f}  {bits:7.4f}  {'#' * round(BARS * bits / most)}" for at, bits in chosen)
    return "\n```\n" + "\n".join(["     step  bits per byte", *rows]) + "\n```\n"


def _side(side: Split) -> str:
    return f"{side.documents:,} documents, {side.text_bytes:,} bytes, {side.tokens:,} tokens"


def _plain(text: str) -> str:
    """The text without characters that have a meaning in Markdown, HTML or a table."""
    return "".join(each if each.isprintable() and each not in '|`<>"\\' else "?" for each in text)
