"""Sequences of tokens, made of rows: what a model is trained on, and what of it carries loss.

A sequence is made of pieces of text, some with loss and some without: a whole text, a prompt and its response, or the
turns of a chat.
"""

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, default_data_collator

from sylva_compile.cli.options import DataConfig
from sylva_compile.cli.tables import Row
from sylva_compile.errors import InputError

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of positions without loss, as in transformers."""
Example = Mapping[str, list[int]]
"""`input_ids`, `attention_mask` and `labels`, each of L integers."""
_Piece = tuple[str, bool]


def encode(rows: Sequence[Row] | str, tokenizer: PreTrainedTokenizerBase, options: DataConfig) -> list[Example]:
    """Return sequences of one length L, so that the compiler sees a single shape; L is `max_length` at most.

    A text is joined and cut into sequences of `max_length`, without the remainder. Each row is one sequence, cut short
    or padded; rows without loss are left out, and the log tells how many.

    Raises:
        InputError: a column that is asked for is missing, or nothing tells which column to use.
    """
    if isinstance(rows, str):
        if options.column or options.response:
            raise InputError(f"--data {options.data} is a text without columns; leave --column and --response out.")
        return _cut(rows, tokenizer, options.max_length)
    if not len(rows):
        raise InputError(f"--data {options.data} has no rows; give one with some.")
    sequences = []
    too_long = 0
    templated, pieces_of = _reader(list(rows[0]), tokenizer, options)
    for at, row in enumerate(rows):
        try:
            pieces = pieces_of(row)
        except InputError:
            raise
        except Exception as error:
            # Templates and rows of any kind raise any error.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"Row {at + 1} of --data {options.data} cannot be read ({reason}); mend it.") from error
        tokens, labels = _tokens(pieces, tokenizer, templated=templated)
        too_long += len(tokens) > options.max_length
        if any(label != IGNORED for label in labels[1 : options.max_length]):
            sequences.append((tokens[: options.max_length], labels[: options.max_length]))
    if left_out := len(rows) - len(sequences):
        log.info("%d of %d rows carry no loss in %d tokens and are left out.", left_out, len(rows), options.max_length)
    if too_long:
        log.info("%d of %d rows are cut to %d tokens.", too_long, len(rows), options.max_length)
    longest = max((len(tokens) for tokens, _ in sequences), default=0)
    # Padding gets neither attention nor loss, so any token serves where the tokenizer defines none for padding.
    filler = tokenizer.pad_token_id or 0
    return [_padded(tokens, labels, longest, filler) for tokens, labels in sequences]


def hold_out(examples: Sequence[Example], options: DataConfig) -> tuple[list[Example], list[Example]]:
    """Shuffle and split into training and held-out sequences; the held-out ones are whole batches of every process.

    Args:
        examples: all of them.
        options: with the share to hold out (with 0 there are none, otherwise a batch at least), the batch size and the
            seed.

    Raises:
        InputError: there are too few sequences for training beside the held-out ones.
    """
    batch = options.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    out = max(1, round(len(examples) * options.held_out / batch)) * batch if options.held_out else 0
    if len(examples) < out + batch:
        raise InputError(
            f"--data {options.data} gives {len(examples)} sequences, and {out + batch} are needed; give more, "
            "or lower --batch-size or --max-length."
        )
    order = torch.randperm(len(examples), generator=torch.Generator("cpu").manual_seed(options.seed)).tolist()
    return [examples[k] for k in order[out:]], [examples[k] for k in order[:out]]


def batches_of(examples: Sequence[Example], batch_size: int, most: int) -> list[dict[str, Tensor]]:
    """Return whole batches of the first `most` examples: `input_ids` and so on, each `[batch_size, L]`."""
    whole = min(len(examples), max(most, batch_size)) // batch_size * batch_size
    return [
        default_data_collator([dict(one) for one in examples[at : at + batch_size]])
        for at in range(0, whole, batch_size)
    ]


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    joined, _ = _tokens([(text, True)], tokenizer)
    parts = [joined[at : at + length] for at in range(0, len(joined) // length * length, length)]
    return [_padded(part, part, length, 0) for part in parts]


def _reader(
    columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, options: DataConfig
) -> tuple[bool, Callable[[Row], list[_Piece]]]:
    """Return whether the chat template is used, and a function that returns the pieces of a row.

    Raises:
        InputError: a column is missing, or nothing tells which column to use.
    """
    if (column := options.column) is not None:
        _check_column(column, columns, "--column", options)
        return False, lambda row: [(text, True)] if (text := _text(row[column])) else []
    if (response := options.response) is not None and options.prompt_template is not None:
        # A shell hands `\n` on as two characters.
        template = options.prompt_template.replace("\\n", "\n").replace("\\t", "\t")
        _check_column(response, columns, "--response", options)
        return (
            False,
            lambda row: [(_fill(template, row), False), (text, True)] if (text := _text(row[response])) else [],
        )
    if "messages" not in columns and not {"prompt", "response"} <= {*columns}:
        raise InputError(f"--data {options.data} has several columns; choose --column from {', '.join(columns)}.")
    if not tokenizer.chat_template:
        raise InputError("The tokenizer has no chat template; give --prompt-template and --response, or --column.")
    return True, lambda row: _turns(_messages(row), tokenizer)


def _check_column(name: str, columns: Sequence[str], option: str, options: DataConfig) -> None:
    if name not in columns:
        raise InputError(f"--data {options.data} has no column {name!r}; choose {option} from {', '.join(columns)}.")


def _fill(template: str, row: Row) -> str:
    try:
        return template.format_map({name: _text(value) for name, value in row.items()})
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"--prompt-template names {error}, which is no column; put names in braces, from {', '.join(row)}."
        ) from None


def _text(value: object) -> str:
    if isinstance(value, list | dict):
        raise TypeError(f"a {type(value).__name__} where text belongs")
    return "" if value is None else str(value).strip()


def _messages(row: Row) -> list[dict[str, str]]:
    if "messages" in row:
        return list(row["messages"] or [])
    # TRL's conversational form has lists of messages here.
    turns = {"user": row["prompt"], "assistant": row["response"]}
    return [
        message
        for role, content in turns.items()
        for message in (content if isinstance(content, list) else [{"role": role, "content": _text(content)}])
    ]


def _turns(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[_Piece]:
    """Return a chat as pieces; the assistant's turns carry loss, with the tokens that end them."""
    pieces: list[_Piece] = []
    said = ""
    for at, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        ask = str(tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages[: at + 1], tokenize=False))
        if not (whole.startswith(ask) and ask.startswith(said)):
            raise InputError(
                "The chat template changes earlier turns, so their loss cannot be told apart; give --prompt-template "
                "and --response."
            )
        # An empty answer, as of a turn that calls tools, would teach the model to say nothing.
        pieces += [(ask[len(said) :], False), (whole[len(ask) :], bool(message.get("content")))]
        said = whole
    return pieces


def _tokens(
    pieces: Sequence[_Piece], tokenizer: PreTrainedTokenizerBase, *, templated: bool = False
) -> tuple[list[int], list[int]]:
    """Return the tokens of the pieces, and their labels, each as long.

    The tokenizer's token that begins a text and the one that ends it are added, unless a chat template wrote the text
    (`templated`) and with it all special tokens.
    """
    end = [] if templated or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    labels: list[int] = []
    for at, (text, carries_loss) in enumerate(pieces):
        piece = list(tokenizer(text, add_special_tokens=at == 0 and not templated, verbose=False)["input_ids"])
        if end and piece[-1:] == end:
            piece.pop()
        tokens += piece
        labels += piece if carries_loss else [IGNORED] * len(piece)
    return tokens + end, labels + end


def _padded(tokens: list[int], labels: list[int], length: int, filler: int) -> Example:
    gap = length - len(tokens)
    return {
        "input_ids": list(itertools.chain(tokens, [filler] * gap)),
        "attention_mask": [1] * len(tokens) + [0] * gap,
        "labels": list(itertools.chain(labels, [IGNORED] * gap)),
    }
