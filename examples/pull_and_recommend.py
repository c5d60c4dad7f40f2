"""Pull a published adapter, recommend after a history, then make it personal.

    python examples/pull_and_recommend.py user/name --history 50,172,181

The private adapter is fitted here, on this history, and is kept in --private-folder; nothing of it
goes anywhere.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="Hub id, or a folder that was exported or pulled")
    parser.add_argument("--history", required=True, help="item ids, oldest first, by commas")
    parser.add_argument("--revision", help="commit, tag or branch")
    parser.add_argument("--catalogue", help="CSV, TSV or Parquet file with item_id and title")
    parser.add_argument("--backbone", help="base model, when not as the adapter names it")
    parser.add_argument("--private-folder", default="my_private_adapter")
    arguments = parser.parse_args()

    from pfm_llm import Recommender

    model = Recommender.from_pretrained(
        arguments.adapter,
        catalogue=arguments.catalogue,
        revision=arguments.revision,
        backbone=arguments.backbone,
    )
    print(model.alignment.describe())
    history = arguments.history.split(",")
    print("shared adapter:")
    for item in model.recommend(history, k=5):
        print(f"  {item.score:8.3f}  {item.title}")

    private = model.personalise(history, arguments.private_folder)
    print(f"with a private adapter, kept in {arguments.private_folder}:")
    for item in model.recommend(history, k=5, private=private):
        print(f"  {item.score:8.3f}  {item.title}")


if __name__ == "__main__":
    main()
