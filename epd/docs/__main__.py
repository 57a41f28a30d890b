"""`python -m epd.docs`: writes the generated pages. Lives in a developer's process."""

import sys

from epd.docs import main

sys.exit(main())
