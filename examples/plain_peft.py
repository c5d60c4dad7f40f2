r"""Use a published adapter with transformers and PEFT alone; pfm_llm is not imported.

    python examples/plain_peft.py user/name --base HuggingFaceTB/SmolLM2-135M-Instruct \
        --items "Star Wars, 1977, Action, Adventure" "Fargo, 1996, Crime, Drama"

Prints the user state after a history: the final hidden state at the last item. The lower layers
read the text of each item by itself, the adapted ones a history of the states that they leave.
The same model can be merged into the base, for servers that take no adapters.
"""

import argparse
from typing import Any


def user_state(model: Any, tokenizer: Any, items: list[str], adapted: int) -> Any:
    """The final hidden state [d] after a history.

    Args:
        model: The base model with the adapter.
        tokenizer: Its tokenizer.
        items: Texts of items, oldest first.
        adapted: Number of adapted layers.
    """
    import torch

    # As the prompt next_item.v2 renders them; pieces are tokenised one by one.
    pieces = ["History:\n", *(f"{item}\n" for item in items)]
    header, *texts = tokenizer(pieces, add_special_tokens=False)["input_ids"]

    def below(tokens: list[int]) -> torch.Tensor:
        """The states [T, d] that enter the lowest adapted layer."""
        output = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
        states: torch.Tensor = output.hidden_states[-1 - adapted][0]
        return states

    decoder = model.get_base_model().get_decoder()
    layers = decoder.layers
    with torch.no_grad():
        states = torch.stack([*below(header), *(below(header + text)[-1] for text in texts)])
        decoder.layers = layers[-adapted:]
        read = decoder(inputs_embeds=states[None], use_cache=False).last_hidden_state
        decoder.layers = layers
    return read[0, -1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="Hub id or folder")
    parser.add_argument("--base", required=True, help="the base model, Hub id or folder")
    parser.add_argument("--items", required=True, nargs="+", help="texts of items, oldest first")
    parser.add_argument("--adapted", type=int, default=2, help="adapted layers, as the card says")
    parser.add_argument("--merged", help="write base and adapter, merged, to this folder")
    arguments = parser.parse_args()

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    state = user_state(model, tokenizer, arguments.items, arguments.adapted)
    print("user state:", ", ".join(f"{value:.4f}" for value in state[:8].tolist()), "…")

    if arguments.merged:
        model.merge_and_unload().save_pretrained(arguments.merged)
        tokenizer.save_pretrained(arguments.merged)
        print(f"merged model: {arguments.merged}")


if __name__ == "__main__":
    main()
