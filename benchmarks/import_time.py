"""
What `import hf_mim` costs over `from transformers import AutoModel, PreTrainedConfig`.

    python benchmarks/import_time.py --rounds 7

Fresh processes in turn with and without it; medians in seconds.
"""

import argparse
import json
import statistics
import subprocess
import sys

BASE = "from transformers import AutoModel, PreTrainedConfig"
CODE = "import time; start = time.perf_counter(); exec({!r}); print(time.perf_counter() - start)"


def seconds(statement: str) -> float:
    result = subprocess.run([sys.executable, "-c", CODE.format(statement)], check=True, capture_output=True, text=True)
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with_it, without = [], []
    for _ in range(args.rounds):
        without.append(seconds(BASE))
        with_it.append(seconds(BASE + "; import hf_mim"))
    base, ours = statistics.median(without), statistics.median(with_it)
    print(json.dumps({"transformers": base, "with_hf_mim": ours, "difference": ours - base}, indent=2))


if __name__ == "__main__":
    main()
