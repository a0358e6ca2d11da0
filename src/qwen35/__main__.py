"""``python -m qwen35``: the command, where it is not on the PATH."""

import sys

from qwen35.cli.main import main

sys.exit(main())
