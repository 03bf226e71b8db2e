"""``python -m minilora.cli``."""

import sys

from minilora.cli import main

sys.exit(main())
