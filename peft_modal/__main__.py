"""`python -m peft_modal`."""

import sys

from peft_modal.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
