"""Keys of items: what makes an item of two catalogues the same."""

import hashlib
import json

from pfm_llm.data.interactions import Catalogue
from pfm_llm.text.prompts import Prompt


def item_keys(catalogue: Catalogue, prompt: Prompt) -> tuple[str, ...]:
    """A key per item: a hash of its id and of its text as the prompt renders it.

    Items of two catalogues are the same if both id and text agree. The texts themselves may be
    protected and are not published.
    """
    pairs = zip(catalogue.item_ids, prompt.catalogue_texts(catalogue), strict=True)
    return tuple(
        hashlib.sha256(json.dumps([item_id, text]).encode()).hexdigest()[:32]
        for item_id, text in pairs
    )
