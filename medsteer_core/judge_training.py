"""`python -m medsteer_core.judge_training`, the documented name of `judges.training`."""

import sys

from .judges.training import main

if __name__ == "__main__":
    sys.exit(main())
