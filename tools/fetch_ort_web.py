"""Put onnxruntime-web into the cache of this folder, for tests: `fetch_ort_web.py --cache DIR`.

Without npm, or without a network, it says so and succeeds: the tests that need it are skipped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from potexport.errors import PotexportError
from potexport.web import ort_web


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    keep = parser.parse_args().cache / f"onnxruntime-web-{ort_web.VERSION}"
    try:
        print(ort_web.find(keep=keep))
    except PotexportError as error:
        print(f"{error}; tests in a browser are left out", file=sys.stderr)


if __name__ == "__main__":
    main()
