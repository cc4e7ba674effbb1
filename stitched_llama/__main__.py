"""`python -m stitched_llama` is the command `stitched-llama`."""

from stitched_llama.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
