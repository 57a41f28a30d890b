"""`python -m epd.docs`."""

import sys

from epd.docs import main

sys.exit(main())
