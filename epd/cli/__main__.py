"""`python -m epd.cli`: the same as `epd`, without relying on the search path. Lives in the user's process."""

import sys

from epd.cli import main

sys.exit(main())
