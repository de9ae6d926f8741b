"""How often the 95% intervals of `analysis.stats` cover the truth on simulated data.

    python tests/benchmarks/interval_coverage.py [--repetitions 4000] > tests/benchmarks/COVERAGE.md

The settings are those of tests/toys/interval_coverage.py; `held` ones are promised to cover in 93-97% of 1,000
repetitions (tests/analysis/stats/test_coverage.py). For independent answers exact_coverage.py computes what is only
sampled here.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toys.interval_coverage import coverage, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=4000)
    parser.add_argument("--only", default="", help="settings whose group and name contain this")
    args = parser.parse_args()
    for setting in settings():
        if args.only in f"{setting.group}: {setting.name}":
            share, width = coverage(setting, args.repetitions)
            inside = "" if 0.93 <= share <= 0.97 else ("above" if share > 0.97 else "**below**")
            print(f"| {setting.group} | {setting.name} | {share:.3f} | {width:.3g} | {inside} |", flush=True)


if __name__ == "__main__":
    main()
