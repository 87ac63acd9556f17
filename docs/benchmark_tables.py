"""Print a benchmark's figures as Markdown tables: python docs/benchmark_tables.py benchmark.json..."""

import json
import sys
from pathlib import Path

from guided_diffusion.benchmarks.tables import document


def main(*paths):
    """Print one document after the other."""
    for path in paths:
        print("\n".join(document(json.loads(Path(path).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
