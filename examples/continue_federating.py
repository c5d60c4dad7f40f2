"""Go on federating from a published adapter, on your own users' histories.

    python examples/continue_federating.py user/name --config configs/quickstart.yaml --rounds 20

What the adapter fixes (prompt, adapted layers, rank, head) is taken from it, everything else from
the config. Items that it does not know start from their text alone.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="Hub id, or a folder that was exported or pulled")
    parser.add_argument("--config", required=True, help="data and federation to go on with")
    parser.add_argument("--revision", help="commit, tag or branch")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()

    from pfm_llm.config.schema import load_config, parse_config
    from pfm_llm.publish import hub
    from pfm_llm.runs.experiment import run_experiment

    manifest = hub.pull(arguments.adapter, arguments.revision).manifest
    tree = load_config(arguments.config).model_dump(mode="json")
    tree["name"] = f"{tree['name']}-continued"
    tree["prompt"] = manifest.prompt
    tree["adapters"] = manifest.adapters.model_dump(mode="json")
    tree["head"] = manifest.head.model_dump(mode="json")
    tree["federation"]["num_rounds"] = arguments.rounds
    tree["init_from"] = {"adapter": arguments.adapter, "revision": arguments.revision}
    run = run_experiment(parse_config(tree, origin=arguments.config))
    print(f"run folder: {run}")


if __name__ == "__main__":
    main()
