"""Chat with a bundle: multi-turn, streamed, at any size.

    python recipes/chat.py BUNDLE --budget 9B

`/size 12B` changes the size in the middle of the conversation, `/sizes` lists them, `--paper` takes the paper's
generation settings. The same as `stitched-llama chat`.
"""

import sys

from stitched_llama.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
else:
    raise ImportError("a recipe is run or copied, not imported")
