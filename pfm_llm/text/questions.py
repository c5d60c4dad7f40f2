r"""Prompts that ask whether a user would like an item, to be answered by yes or no.

TALLRec (Bao et al. 2023, arXiv 2305.00447, section 3.1) asks in this way: the items that the user
liked, those that the user did not like, and one new item. A prompt is a TOML file as in
`text.prompts`, and is never edited either::

    name = "would_like"
    version = 1
    description = "Titles, and all that describes the item in question."
    header = "Items that a user has rated.\n"   # plain text at the start
    liked = "The user liked:\n"                 # plain text before the liked items
    disliked = "The user disliked:\n"           # plain text before the others
    item = "{title}\n"                          # one item of the history
    question = "Would the user like {title}?"   # the item in question
    answer = "\nAnswer:"                        # plain text before the answer
    yes = " Yes"                                # one token of the language model
    no = " No"                                  # likewise
    fields = ["title"]                          # exactly the item fields used

``item`` and ``question`` are templates. A heading without items is left out. A control token of
the model works in the plain texts alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from pfm_llm.base.errors import ConfigError
from pfm_llm.config.model import PositiveCount, Settings
from pfm_llm.config.text import validated
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.prompts import (
    DETAILS,
    check_fields,
    check_name,
    check_plain,
    check_templates,
    find_prompt,
    item_fields,
    read_prompt_file,
    render_text,
)
from pfm_llm.text.templates import placeholders

WOULD_LIKE = "would_like.v1"
"""The key of the shipped prompt."""
_PLAIN = ("header", "liked", "disliked", "answer", "yes", "no")


class _QuestionFile(Settings):
    """The keys of a prompt file."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern="^[a-z0-9_]+$")]
    version: PositiveCount
    description: str
    header: str
    liked: str
    disliked: str
    item: str
    question: str
    answer: str
    yes: str
    no: str
    fields: list[str]


@dataclass(frozen=True)
class QuestionPrompt:
    """One version of a prompt that asks for yes or no, checked; the module describes its texts."""

    name: str
    version: int
    header: str
    liked: str
    disliked: str
    item: str
    question: str
    answer: str
    yes: str
    no: str
    fields: tuple[str, ...]

    @property
    def key(self) -> str:
        """``<name>.v<version>``: the file's name without ``.toml``."""
        return f"{self.name}.v{self.version}"

    def content_hash(self) -> str:
        """SHA-256, in hex, over everything that the rendered text depends on."""
        parts = json.dumps([*dataclasses.astuple(self)])
        return hashlib.sha256(parts.encode()).hexdigest()

    def fields_of(self, catalogue: Catalogue) -> list[dict[str, str]]:
        """The fields of every item that the templates use.

        Raises:
            DataError: A field is missing; the message names it and the available fields.
        """
        shows_details = DETAILS in placeholders(self.item) | placeholders(self.question)
        return item_fields(self.key, self.fields, shows_details, catalogue)

    def render_item(self, fields: Mapping[str, str]) -> str:
        """The text of one item of a history.

        Raises:
            DataError: The text is empty.
        """
        return render_text(self.key, self.item, fields)

    def render_question(self, fields: Mapping[str, str]) -> str:
        """The question about one item, without the text before the answer.

        Raises:
            DataError: The text is empty.
        """
        return render_text(self.key, self.question, fields)

    def answer_tokens(self, tokenizer: Any) -> tuple[int, int]:
        """The tokens of yes and of no.

        Args:
            tokenizer: A Hugging Face tokenizer.

        Raises:
            ConfigError: An answer is not a single token of the tokenizer, or both are the same.
        """
        found = []
        for key in ("yes", "no"):
            text = getattr(self, key)
            (tokens,) = tokenizer([text], add_special_tokens=False)["input_ids"]
            if len(tokens) != 1:
                raise ConfigError(
                    f"prompt {self.key}: {key}: {text!r} is {len(tokens)} tokens of this language "
                    "model, and must be one; choose another word, with or without the blank before "
                    "it, in a prompt of your own"
                )
            found.append(int(tokens[0]))
        if found[0] == found[1]:
            raise ConfigError(
                f"prompt {self.key}: yes and no are the same token of this language model; choose "
                "other words in a prompt of your own"
            )
        return found[0], found[1]


def load_question(name_or_path: str = WOULD_LIKE) -> QuestionPrompt:
    """Read and check a prompt that asks for yes or no.

    Args:
        name_or_path: The key of a shipped prompt, or the path of a TOML file.

    Raises:
        ConfigError: There is no such prompt, or the file breaks the format; the message names the
            file and the key.
    """
    path = find_prompt(name_or_path, "question")
    file = validated(read_prompt_file(path)[0], _QuestionFile, str(path))
    values = file.model_dump(exclude={"description", "fields"})
    prompt = QuestionPrompt(**values, fields=tuple(file.fields))
    try:
        for key in _PLAIN:
            check_plain(values[key], key)
        check_fields(file.fields)
        check_templates(
            {"item": file.item, "question": file.question},
            file.fields,
            {"item": {DETAILS}, "question": {DETAILS}},
        )
        for key in ("answer", "yes", "no"):
            if not values[key]:
                raise ConfigError(f"{key}: empty; give it a text")
        check_name(prompt.key, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return prompt
