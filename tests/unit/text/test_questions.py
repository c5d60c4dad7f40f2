"""Tests of pfm_llm.text.questions and of the shipped prompt that asks for yes or no."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pfm_llm.base.errors import ConfigError, DataError
from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.prompts import load_prompt
from pfm_llm.text.questions import WOULD_LIKE, QuestionPrompt, load_question
from tests.support.golden import assert_golden
from tests.support.tiny import Tiny

GOOD = {
    "name": "mine",
    "header": "Rated:",
    "liked": "Liked:",
    "disliked": "Disliked:",
    "item": "{title}[ ({year})]",
    "question": "Would they like {title}?",
    "answer": "Answer:",
    "yes": "a",
    "no": "b",
}


def write(folder: Path, **changes: str) -> str:
    """A prompt file like GOOD with these keys changed; no text needs escapes."""
    lines = [f'{key} = "{value}"' for key, value in {**GOOD, **changes}.items()]
    lines += ["version = 1", 'description = "For tests."', 'fields = ["title", "year"]']
    path = folder / "mine.v1.toml"
    path.write_text("\n".join(lines))
    return str(path)


def test_shipped_prompt_is_never_edited() -> None:
    """Rendered text and hash equal the golden file. A changed prompt is a new version."""
    prompt = load_question()
    brazil = {"title": "Brazil", "details": "1985, Sci-Fi"}
    ran = {"title": "Ran", "details": ""}
    asked = "".join(prompt.render_question(one) + prompt.answer + "\n" for one in (brazil, ran))
    history = prompt.liked + prompt.render_item(brazil) + prompt.disliked + prompt.render_item(ran)
    rendered = f"{prompt.content_hash()}\n{prompt.header}{history}--- questions\n{asked}"
    rendered += f"--- answers\n{prompt.yes!r} {prompt.no!r}\n"
    assert_golden(f"{WOULD_LIKE}.txt", rendered)


def test_each_loader_knows_the_prompts_of_its_kind() -> None:
    with pytest.raises(ConfigError, match=r"unknown prompt 'would_like\.v1'.*next_item\.v1"):
        load_prompt(WOULD_LIKE)
    with pytest.raises(ConfigError, match=r"unknown prompt 'next_item\.v1'; there are would_like"):
        load_question("next_item.v1")


def test_file_is_read_as_it_stands(tmp_path: Path) -> None:
    prompt = load_question(write(tmp_path))
    assert prompt == QuestionPrompt(**GOOD, version=1, fields=("title", "year"))  # type: ignore[arg-type]
    assert prompt.render_item({"title": "Ran", "year": ""}) == "Ran"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "Would they like {name}?"}, "question: placeholder {name}"),
        ({"question": "Would they like it?"}, "question: has no item field"),
        ({"item": "{title}"}, "'year' is not used"),
        ({"header": "{title}"}, "header: is plain text"),
        ({"answer": ""}, "answer: empty"),
        ({"name": "other"}, r"call the file other\.v1\.toml"),
        ({"maybe": "c"}, "unknown key maybe"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.v1\.toml[^$]*{message}"):
        load_question(write(tmp_path, **changes))


def test_answers_are_single_tokens_of_the_tokenizer(tmp_path: Path, tiny: Tiny) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny.model)
    prompt = load_question(write(tmp_path))
    assert prompt.answer_tokens(tokenizer) == tuple(tokenizer.convert_tokens_to_ids(["a", "b"]))
    with pytest.raises(ConfigError, match=r"yes: 'xyzzy' is \d tokens of this language model"):
        load_question(write(tmp_path, yes="xyzzy")).answer_tokens(tokenizer)
    with pytest.raises(ConfigError, match="yes and no are the same token"):
        load_question(write(tmp_path, yes="b")).answer_tokens(tokenizer)


def test_missing_field_and_empty_text_are_errors(tmp_path: Path) -> None:
    prompt = load_question(write(tmp_path))
    with pytest.raises(DataError, match="'year'"):
        prompt.fields_of(Catalogue(("i0",), {"title": ("Ran",)}))
    nothing = QuestionPrompt(**{**GOOD, "item": "{title}"}, version=1, fields=("title",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no text"):
        nothing.render_item({"title": " "})
