"""Entry point of `python -m trainer.checkpoints`."""

import sys

from trainer.checkpoints import main

if __name__ == "__main__":
    sys.exit(main())
