"""`python -m ftray.engine.native`: compile the kernels."""

from ftray.core.errors import FtrayError
from ftray.engine.native import build

if __name__ == "__main__":
    try:
        print(build())
    except FtrayError as error:
        print(error)
