"""One command from a checkpoint to an artefact: `python export.py MODEL OUT [options]`, the same as `attnspan export`."""

import sys

try:
    from attnspan.export.cli import main
except ImportError as error:
    sys.exit(f"error: attnspan is not installed ({error}); run: pip install '.[cpu,export]'")

if __name__ == "__main__":
    raise SystemExit(main(["export", *sys.argv[1:]]))
