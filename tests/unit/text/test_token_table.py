"""Tokenised texts: equal to the tokenizer's own, kept as Arrow, rebuilt when damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from pfm_llm.text.token_table import encode_letters, tokenise


class Lengths:
    """Counts its calls; a text becomes its characters' code points."""

    def __init__(self, offset: int = 0) -> None:
        self.calls = 0
        self.offset = offset

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        self.calls += 1
        return {"input_ids": [[ord(c) + self.offset for c in text] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {"offset": self.offset}


def test_rows_are_the_tokens_of_each_text(tmp_path: Path) -> None:
    table = tokenise(["ab", "", "c"], Lengths(), tmp_path)
    assert len(table) == 3
    assert [table[i].tolist() for i in range(3)] == [[97, 98], [], [99]]
    assert table[0].dtype == np.int32


def test_a_second_time_nothing_is_tokenised(tmp_path: Path) -> None:
    tokenise(["ab", "c"], Lengths(), tmp_path)
    again = Lengths()
    assert tokenise(["ab", "c"], again, tmp_path)[0].tolist() == [97, 98]
    assert again.calls == 0


def test_other_texts_or_another_tokenizer_are_other_tables(tmp_path: Path) -> None:
    tokenise(["ab", "c"], Lengths(), tmp_path)
    assert tokenise(["ab", "d"], Lengths(), tmp_path)[1].tolist() == [100]
    assert tokenise(["ab", "c"], Lengths(offset=1), tmp_path)[1].tolist() == [100]
    assert len(list(tmp_path.glob("*.arrow"))) == 3


@pytest.mark.parametrize("content", [b"", b"not arrow at all"])
def test_a_damaged_table_is_made_again(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    tokenise(["ab", "c"], Lengths(), tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(content)
    assert tokenise(["ab", "c"], Lengths(), tmp_path)[1].tolist() == [99]
    assert "damaged" in caplog.text


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    tokenise(["ab", "c"], Lengths(), tmp_path)
    (path,) = tmp_path.glob("*.arrow")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        again = Lengths()
        assert [row.tolist() for row in tokenise(["ab", "c"], again, tmp_path)] == [[97, 98], [99]]
        assert again.calls == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("suffix", [".arrow", ".sha256"])
def test_a_folder_in_place_of_a_file_costs_no_run(tmp_path: Path, suffix: str) -> None:
    tokenise(["ab", "c"], Lengths(), tmp_path)
    (path,) = tmp_path.glob(f"*{suffix}")
    path.unlink()
    path.mkdir()
    assert tokenise(["ab", "c"], Lengths(), tmp_path)[1].tolist() == [99]


def test_a_table_without_a_checksum_is_made_again(tmp_path: Path) -> None:
    tokenise(["ab", "c"], Lengths(), tmp_path)
    (path,) = tmp_path.glob("*.sha256")
    path.unlink()
    again = Lengths()
    tokenise(["ab", "c"], again, tmp_path)
    assert again.calls == 1
    assert path.exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert tokenise(["ab"], Lengths(), blocked / "tokens")[0].tolist() == [97, 98]
    assert "not kept" in caplog.text


def with_control_tokens() -> Any:
    """Bytes, and tokens of four kinds: special, added, of blanks, and found in any letter case."""
    alphabet = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    fast = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>")
    tokenizer.add_tokens(["<think>", "   "])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True)])
    return tokenizer


@pytest.mark.parametrize(
    "text",
    ["<|end|>", "a<|end|><|end|> b", "<think>", "so <think>hm<|end|>", "<TOOL>", "a <Tool> b"],
)
def test_a_text_never_becomes_a_control_token(text: str) -> None:
    tokenizer = with_control_tokens()
    (plain,) = tokenizer([text], add_special_tokens=False)["input_ids"]
    (tokens,) = encode_letters([text], tokenizer)
    control = set(tokenizer.convert_tokens_to_ids(["<|end|>", "<think>", "<tool>"]))
    assert control & set(plain)
    assert not control & set(tokens)
    assert tokenizer.decode(tokens) == text.lower()


def test_other_texts_keep_their_tokens_and_blanks_are_no_control_token() -> None:
    tokenizer = with_control_tokens()
    texts = ["", "plain", "<|end|", "< think >", "three   blanks"]
    plain = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("   ") in plain[-1]
    assert encode_letters(texts, tokenizer) == plain


def test_an_unknown_letter_is_no_control_token() -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert encode_letters(["a b"], tokenizer) == [[1, 0]]
