"""Rebuild results/claims.json from the committed result files (make claims)."""

import argparse
import functools

from pfm_llm.cli.start import run_safely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail when claims.json is stale"
    )
    run_safely(functools.partial(update, parser.parse_args()))


def update(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from pfm_llm.suite.claims import build_claims, claims_text

    root = Path(__file__).resolve().parent.parent
    path = root / "results" / "claims.json"
    claims = build_claims(root)
    text = claims_text(claims)
    if arguments.check and (not path.is_file() or path.read_text() != text):
        raise SystemExit("results/claims.json is stale; run make claims")
    if not arguments.check:
        path.write_text(text)
    failed = [claim.id for claim in claims if claim.holds is False]
    print(f"{len(claims)} claims; not met: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main()
