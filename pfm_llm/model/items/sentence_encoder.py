"""Text encoders that make one vector of a text, such as all-MiniLM-L6-v2, run by transformers.

A folder of the package sentence-transformers says how token states become the vector of a text
(``1_Pooling/config.json``); a folder without that file is read by the mean of its token states.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from transformers import AutoModel, AutoTokenizer

from pfm_llm.base import assets, files
from pfm_llm.base.errors import BackboneError, PfmError
from pfm_llm.base.locks import LOADING
from pfm_llm.base.progress import Progress
from pfm_llm.config.model import DETAILED_TOKENS, ItemsConfig
from pfm_llm.model.backbone import hash_weights, reason_of

EMBEDDED_ENCODERS = {"minilm": assets.minilm}

_POOLING_FILE = "1_Pooling/config.json"
_MEAN, _CLS = "pooling_mode_mean_tokens", "pooling_mode_cls_token"
_BATCH = 64


class SentenceEncoder:
    """A frozen text encoder.

    Args:
        name: The name in the config.
        model: An encoder of transformers, in eval mode.
        tokenizer: Its tokenizer.
        by_cls: Whether the state of the first token is the vector; else the mean of all.
        max_tokens: Tokens that are read of a text.

    Attributes:
        identity: SHA-256, in hex, over its weights and settings.
        width: Numbers of a vector.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: Any, by_cls: bool, max_tokens: int
    ) -> None:
        self._name = name
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._by_cls = by_cls
        limit = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = min(max_tokens, limit)
        self.width: int = model.config.hidden_size
        parts = f"{hash_weights(model)}/{'cls' if by_cls else 'mean'}"
        self.identity = hashlib.sha256(parts.encode()).hexdigest()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], progress: Progress | None = None) -> torch.Tensor:
        """Vectors of unit length, float32 [len(texts), width], on the CPU.

        Args:
            texts: The texts.
            progress: Counts the texts that are read.
        """
        vectors = torch.empty(len(texts), self.width)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = self._tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            )
            states = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            pooled = states[:, 0] if self._by_cls else (states * mask).sum(1) / mask.sum(1)
            vectors[torch.tensor(rows)] = F.normalize(pooled, dim=1)
            if progress is not None:
                progress.update(len(rows))
        return vectors


def load_sentence_encoder(config: ItemsConfig) -> SentenceEncoder:
    """Load the embedded encoder, a Hub id or a local folder. No code of its folder is run.

    Args:
        config: Name, revision and length of texts.

    Raises:
        BackboneError: It is not found, not reachable, no text encoder, has no safetensors weights,
            or makes vectors in a way that is neither mean nor first token.
        AssetError: The embedded encoder cannot be fetched.
    """
    embedded = EMBEDDED_ENCODERS.get(config.encoder)
    source: str | Path = embedded() if embedded else config.encoder
    options: Any = {"revision": config.revision, "trust_remote_code": False}
    try:
        with LOADING, files.interruptible():
            by_cls = _is_by_cls(source, config.revision)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model = AutoModel.from_pretrained(source, **options, use_safetensors=True)
    except PfmError:
        raise
    except Exception as error:  # transformers, tokenizers and the Hub have many of their own
        raise BackboneError(
            f"cannot load the encoder {config.encoder!r} of items.encoder: {reason_of(error)} "
            f"(backbone; embedded: {', '.join(EMBEDDED_ENCODERS)}; or a Hub id, or a local folder)"
        ) from error
    return SentenceEncoder(
        config.encoder, model, tokenizer, by_cls, config.max_tokens or DETAILED_TOKENS
    )


def _is_by_cls(source: str | Path, revision: str | None) -> bool:
    """Whether the first token's state is the vector, by the settings of sentence-transformers."""
    path = Path(source) / _POOLING_FILE
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(str(source), _POOLING_FILE, revision=revision))
        except hub_errors.EntryNotFoundError:
            return False
    if not path.is_file():
        return False
    settings = files.read_json(path)
    chosen = {
        key
        for key, value in (settings.items() if isinstance(settings, dict) else ())
        if key.startswith("pooling_mode_") and value is True
    }
    if chosen not in ({_MEAN}, {_CLS}):
        raise BackboneError(
            f"{source} makes vectors by {', '.join(sorted(chosen)) or 'no known rule'}; choose an "
            "encoder that takes the mean of the tokens or the first token"
        )
    return chosen == {_CLS}
