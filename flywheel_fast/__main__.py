import sys

from flywheel_fast.cli import main

sys.exit(main())
