r"""Use a published adapter with transformers and PEFT alone; pfm_llm is not imported.

    python examples/plain_peft.py user/name --base HuggingFaceTB/SmolLM2-135M-Instruct \
        --titles "Star Wars" "Fargo"

Prints the user state after a history: the final hidden state at the last token of the last item.
The same model can be merged into the base, for servers that take no adapters.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="Hub id or folder")
    parser.add_argument("--base", required=True, help="the base model, Hub id or folder")
    parser.add_argument("--titles", required=True, nargs="+", help="a history, oldest first")
    parser.add_argument("--merged", help="write base and adapter, merged, to this folder")
    arguments = parser.parse_args()

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()

    # As the prompt next_item.v1 renders it; pieces are tokenised one by one.
    pieces = ["History:\n", *(f"{title}\n" for title in arguments.titles)]
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    tokens = [token for piece in encoded for token in piece]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([tokens]), output_hidden_states=True)
    state = output.hidden_states[-1][0, -1]
    print("user state:", ", ".join(f"{value:.4f}" for value in state[:8].tolist()), "…")

    if arguments.merged:
        model.merge_and_unload().save_pretrained(arguments.merged)
        tokenizer.save_pretrained(arguments.merged)
        print(f"merged model: {arguments.merged}")


if __name__ == "__main__":
    main()
