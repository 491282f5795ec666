"""`python -m petune.cli`"""

import sys

from petune.cli import main

sys.exit(main())
