"""`python -m fastssl.data_prep ...` is `fastssl convert ...`."""

import sys

from fastssl.data_prep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
